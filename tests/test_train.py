import math
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import ambient
from torch import nn
from torch.testing import assert_close

from nala_min import Config, NaLaLM, NaLaViT, distributed, measure, train
from nala_min.flags import UsageError, flag, parse_flags
from nala_min.train import Recipe, fit

# --- Settings ------------------------------------------------------------------------------------


@dataclass
class Run(train.Settings):
    """A run of something small."""

    NAME = "toy"
    # fmt: off
    PRESETS = {  # noqa: RUF012
        "cpu": dict(steps=50, batch=2, lr=0.5, muon=0.125, weight_decay=0.0, dropout=0.0, layers=2,
                    heads=2, dim=8, width=8, shift=1),
        "gpu": dict(steps=70, batch=4, lr=0.25, muon=0.0, weight_decay=0.1, dropout=0.2, layers=4,
                    heads=3, dim=12, width=16, shift=2),
    }
    # fmt: on

    width: int | None = flag(None, "how wide it is")
    shift: int | None = flag(None, "how far it moves", least=0)
    words: str = flag("", "what it says", affects_result=False)


def test_a_preset_fills_in_missing_flags():
    run = parse_flags(Run, ["--preset", "gpu", "--steps", "3", "--dropout", "0"])
    assert (run.steps, run.batch, run.lr, run.dropout, run.width) == (3, 4, 0.25, 0.0, 16)
    assert (run.layers, run.heads, run.dim, run.shift) == (4, 3, 12, 2)
    assert parse_flags(Run, ["--preset", "gpu"]).out == Path("runs") / "toy_gpu_nala_seed1"
    assert run.out == Path("runs") / "toy_gpu_nala_seed1_steps3_dropout0"  # nothing overwritten
    other = parse_flags(Run, ["--preset", "gpu", "--schedule", "cosine"])
    assert other.out == Path("runs") / "toy_gpu_nala_seed1_cosine"
    assert parse_flags(Run, ["--out", "here"]).out == Path("here")


def test_attentions_of_several_blocks_make_one_folder_without_commas():
    flags = ["--preset", "cpu", "--attention", "nala,softmax"]
    assert parse_flags(Run, flags).out == Path("runs") / "toy_cpu_nala-softmax_seed1"


@pytest.mark.parametrize(
    ("attention", "names"), [("elu", ("elu", "elu")), ("nala,softmax", ("nala", "softmax"))]
)
def test_the_flags_set_the_sizes_of_a_model(attention, names):
    flags = ["--preset", "cpu", "--attention", attention, "--dropout", "0.25"]
    config = Config(**train.block_options(parse_flags(Run, flags).config()))
    sizes = (config.num_layers, config.num_heads, config.dim, config.dropout)
    assert sizes == (2, 2, 8, 0.25) and config.attentions == names


@pytest.mark.parametrize(
    ("cuda", "device", "preset", "steps"),
    [
        *((True, "auto", "gpu", 70), (True, "cuda", "gpu", 70), (True, "cpu", "cpu", 50)),
        (False, "auto", "cpu", 50),
    ],
)
def test_the_preset_is_chosen_by_whether_a_cuda_card_trains(cuda, device, preset, steps, machine):
    machine(cuda, False)
    run = parse_flags(Run, ["--device", device])
    assert (run.preset, run.steps) == (preset, steps)


def test_the_help_of_a_preset_flag_has_both_values(capsys):
    with pytest.raises(SystemExit):
        parse_flags(Run, ["--help"])
    assert "how wide it is (cpu: 8, gpu: 16)" in capsys.readouterr().out


def test_the_config_has_all_that_affects_the_result():
    flags = ["--preset", "cpu", "--words", "hi", "--out", "o", "--device", "cpu", "--resume"]
    assert parse_flags(Run, [*flags, "--seed", "3", "--attention", "elu"]).config() == {
        "preset": "cpu",
        "attention": "elu",
        "seed": 3,
        "steps": 50,
        "batch": 2,
        "lr": 0.5,
        "muon": 0.125,
        "weight_decay": 0.0,
        "schedule": "linear",
        "dropout": 0.0,
        "layers": 2,
        "heads": 2,
        "dim": 8,
        "width": 8,
        "shift": 1,
    }


@pytest.mark.parametrize(
    ("steps", "every", "device", "bfloat16"),
    [("1", 1, "cpu", False), ("9", 1, "cuda", True), ("59", 5, "mps", False)],
)
def test_the_recipe_of_settings(steps, every, device, bfloat16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    flags = ["--preset", "cpu", "--steps", steps, "--weight-decay", "0.25", "--schedule", "cosine"]
    recipe = parse_flags(Run, [*flags, "--seed", "7"]).recipe(torch.device(device))
    options = {"muon": 0.125, "weight_decay": 0.25, "schedule": "cosine", "seed": 7}
    assert recipe == Recipe(int(steps), 0.5, eval_every=every, bfloat16=bfloat16, **options)


@pytest.mark.parametrize(
    "argv",
    [
        ["--steps", "0"],
        ["--batch", "-1"],
        ["--lr", "nan"],
        ["--lr", "0"],
        ["--muon", "-1"],
        ["--weight-decay", "nan"],
        ["--width", "0"],
        ["--shift", "-1"],
        ["--heads", "3"],
        ["--dim", "9"],
        ["--lr", "inf"],
        ["--attention", "fast"],
        ["--attention", "nala,"],
        ["--attention", "softmax,nala", "--layers", "3"],
        ["--dropout", "1"],
        ["--dropout", "-0.1"],
        ["--seed", "-1"],
        ["--seed", str(2**63)],
    ],
)
def test_impossible_settings_name_the_flag(argv):
    with pytest.raises(UsageError, match=argv[0]):
        parse_flags(Run, ["--preset", "cpu", *argv])


def test_only_some_flags_may_be_zero():
    flags = ["--dropout", "0", "--shift", "0", "--muon", "0", "--weight-decay", "0", "--seed", "0"]
    run = parse_flags(Run, flags)
    assert (run.dropout, run.shift, run.muon, run.weight_decay, run.seed) == (0, 0, 0, 0, 0)
    with pytest.raises(UsageError, match="--dropout must be at least 0 and below 1, got -1"):
        parse_flags(Run, ["--dropout", "-1"])
    with pytest.raises(UsageError, match=r"--width must be at least 1 and below .*, got 0"):
        parse_flags(Run, ["--width", "0"])


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda, mps): pretend that the machine has these accelerators."""

    def machine(cuda, mps):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return machine


@pytest.mark.parametrize(
    ("name", "cuda", "mps", "chosen"),
    [
        ("auto", False, False, "cpu"),
        ("auto", True, True, "cuda"),
        ("auto", False, True, "mps"),
        ("cpu", True, True, "cpu"),
    ],
)
def test_choose_device_takes_the_named_one_or_the_best(name, cuda, mps, chosen, machine):
    machine(cuda, mps)
    assert train.choose_device(name) == torch.device(chosen)


@pytest.mark.parametrize(("name", "cuda", "mps"), [("cuda", False, True), ("mps", True, False)])
def test_choose_device_refuses_a_missing_device(name, cuda, mps, machine):
    machine(cuda, mps)
    with pytest.raises(UsageError, match=f"--device {name}"):
        train.choose_device(name)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_takes_its_own_card(name, machine, monkeypatch):
    machine(True, False)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UsageError, match="one card per process"):
        train.choose_device(name)
    assert train.choose_device("cpu") == torch.device("cpu")
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert train.choose_device(name) == torch.device("cuda", 1) and taken == [1]


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_for_cards_that_support_it(native, monkeypatch):
    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert train.has_bfloat16(torch.device("cuda")) == native
    assert not any(train.has_bfloat16(torch.device(name)) for name in ("cpu", "mps"))


@pytest.mark.parametrize("bfloat16", [True, False])
def test_float32_products_use_tf32_only_with_bfloat16(bfloat16, tmp_path):
    """And only during training, however it ends."""
    before, seen = torch.get_float32_matmul_precision(), []

    def loss(model, x, y):
        seen.append(torch.get_float32_matmul_precision())
        if len(seen) == 3:
            raise RuntimeError("on purpose")
        return model(x).float().square().mean()

    recipe = Recipe(5, 1e-3, bfloat16=bfloat16)
    with pytest.raises(RuntimeError, match="on purpose"):
        train.fit(
            nn.Linear(2, 2),
            recipe,
            batch=lambda step: (torch.ones(1, 2), torch.ones(1, 2)),
            loss=loss,
            evaluate=lambda model: {},
            checkpoint=tmp_path / "checkpoint.pt",
            extra={},
        )
    assert set(seen) == {"high" if bfloat16 else before}
    assert torch.get_float32_matmul_precision() == before


def test_a_compiled_run_is_another_run():
    plain, compiled = (parse_flags(Run, x) for x in ([], ["--compile"]))
    assert compiled.config() == plain.config() | {"compile": True}
    assert compiled.out == plain.out.with_name(plain.out.name + "_compiled")


# --- Recipe and optimiser ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "quarter", "half", "last"),
    [("linear", 0.75, 0.5, 0.001), ("cosine", 0.1 + 0.9 * (0.5 + math.sqrt(0.125)), 0.55, 0.1)],
)
def test_the_learning_rate_warms_up_and_decays(schedule, quarter, half, last):
    """Linearly to zero, or along a cosine to a tenth."""
    recipe = Recipe(steps=1000, learning_rate=0.5, warmup=10, schedule=schedule)
    rates = [recipe.learning_rate_at(step, 2.0) / 2.0 for step in range(1000)]
    for step in range(10):
        assert rates[step] == pytest.approx((step + 1) / 10, rel=1e-2)
    assert max(rates) <= 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[250] == pytest.approx(quarter)
    assert rates[500] == pytest.approx(half)
    assert rates[999] == pytest.approx(last, rel=1e-3)


@pytest.mark.parametrize("schedule", train.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 3, 100, 150])
def test_the_learning_rate_is_never_zero_negative_or_above_its_peak(steps, schedule):
    recipe = Recipe(steps, learning_rate=0.5, schedule=schedule)
    assert all(0 < recipe.learning_rate_at(step, 0.5) <= 0.5 for step in range(steps))


@pytest.mark.parametrize(
    "wrong",
    [{"clip": -1.0}, {"warmup": -1}, {"eval_every": 0}, {"steps": 0}, {"schedule": "step"},
     {"learning_rate": math.nan}, {"muon": -0.1}, {"weight_decay": -1.0}],
    ids=str,
)  # fmt: skip
def test_a_recipe_without_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be "):
        Recipe(**{"steps": 5, "learning_rate": 0.1} | wrong)


def small_model(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return NaLaLM(Config(vocab_size=11, num_layers=1, num_heads=2, dim=16, dropout=dropout))


def small_vit():
    return NaLaViT(Config(num_layers=1, num_heads=2, dim=16))


@pytest.mark.parametrize("make", [small_model, small_vit])
def test_the_optimizer_decays_matrices_only_and_has_every_parameter_once(make):
    model = make()
    recipe = Recipe(3, 0.25, weight_decay=0.125, beta2=0.75)
    (optimizer,) = train.make_optimizers(model, recipe)
    matrices = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d)
    ]
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
    assert decay.keys() == {id(parameter) for parameter in model.parameters()}
    assert {i for i, value in decay.items() if value == 0.125} == {id(x) for x in matrices}
    assert set(decay.values()) == {0.125, 0.0}
    for group in optimizer.param_groups:
        assert group["lr"] == 0.25 and group["betas"] == (0.9, 0.75)


@pytest.mark.parametrize("make", [small_model, small_vit])
def test_muon_takes_the_matrices_between_embedding_and_head(make):
    """Every parameter in one group: matrices and convolutions to Muon, embedding, head, biases and
    gains to AdamW."""
    model = make()
    recipe = Recipe(3, 0.25, muon=0.5, weight_decay=0.125)
    adam, muon = train.make_optimizers(model, recipe)
    groups = [(opt, group) for opt in (adam, muon) for group in opt.param_groups]
    ids = [id(p) for _, group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    kind = {id(p): (opt, group["weight_decay"]) for opt, group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            expected = adam, 0.0
        else:
            expected = (adam if name in ("embed.weight", "head.weight") else muon), 0.125
        assert kind[id(parameter)] == expected, name
    assert {group["lr"] for group in adam.param_groups} == {0.25}
    assert {group["lr"] for group in muon.param_groups} == {0.5}


@pytest.mark.parametrize("shape", [(6, 6), (5, 40), (40, 5)])
def test_orthogonal_keeps_the_directions_and_evens_out_the_singular_values(shape):
    """Against the singular value decomposition, for a matrix of any size and scale."""
    short = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, short, dtype=torch.float64))[0] for n in shape)
    values = torch.linspace(1.0, 0.05, short, dtype=torch.float64)
    for scale in (1e-4, 1.0, 1e4):
        spectrum = u.mT @ train.orthogonal(scale * u @ values.diag() @ v.mT) @ v
        assert ((spectrum.diag() > 0.6) & (spectrum.diag() < 1.25)).all()
        assert_close(spectrum, spectrum.diag().diag())


@pytest.mark.parametrize("make", [small_model, small_vit])
def test_a_step_never_waits_for_the_device(make, monkeypatch):
    """Tensors on the "meta" device have no values: reading one, as .item() does, or mixing devices
    fails."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *args, fused, **options: adamw(*args, **options)
    )
    with torch.device("meta"):
        model = make()
        if make is small_model:
            tokens = torch.zeros(2, 300, dtype=torch.long)
            call = partial(measure.next_token_loss, model, tokens, tokens)
        else:
            images, labels = torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
            call = partial(measure.smoothed_loss, model, images, labels)
    optimizers = train.make_optimizers(model, Recipe(3, 0.25, muon=0.5))
    for _ in range(2):
        call().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert all(parameter.grad.is_meta for parameter in model.parameters())


def test_muon_steps_by_hand():
    """Nesterov momentum, orthogonalised. A convolution is a matrix with one row per output channel,
    and a tall matrix takes longer steps. Matrices of equal shape are batched but stay separate."""
    shapes = (6, 2), (4, 3, 2, 2), (6, 2), (2, 6)
    weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    fitted = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = train.Muon(fitted, lr=0.5, weight_decay=0.25)
    momenta = [torch.zeros_like(weight) for weight in weights]
    for _ in range(3):
        for i, parameter in enumerate(fitted):
            gradient = parameter.grad = 10.0**i * torch.randn_like(parameter)
            momenta[i] = 0.95 * momenta[i] + 0.05 * gradient
            ahead = 0.05 * gradient + 0.95 * momenta[i]
            direction = train.orthogonal(ahead.reshape(len(ahead), -1)).reshape(ahead.shape)
            stretch = math.sqrt(3) if len(ahead) == 6 else 1.0
            weights[i] = (1 - 0.5 * 0.25) * weights[i] - 0.5 * stretch * direction
        optimizer.step()
    for parameter, weight in zip(fitted, weights, strict=True):
        assert_close(parameter.data, weight)
    assert optimizer.step(lambda: fitted[0].square().sum().backward() or 0.5) == 0.5


# --- The loop ------------------------------------------------------------------------------------

EXTRA = {"attention": "nala", "dim": 16, "text": "märchen.txt"}


def batch(step):
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def loss(model, inputs, targets):
    logits, _ = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model):
    model.eval()
    return {"validation_loss": loss(model, *batch(1000)).item()}


def train_small(model, path, recipe=None, **options):
    """fit with the functions above, unless options replace them."""
    options = dict(batch=batch, loss=loss, evaluate=evaluate, extra=EXTRA) | options
    recipe = recipe or Recipe(steps=7, learning_rate=0.01, warmup=2, eval_every=3)
    return fit(model, recipe, checkpoint=path, **options)


@pytest.mark.parametrize("resume", [False, True])
def test_the_user_s_random_state_is_left_alone(resume, tmp_path):
    """What a user draws after fit depends on the user's seed, as if fit had not run; in PyTorch,
    NumPy and Python."""
    draw = lambda: (torch.rand(2).tolist(), np.random.rand(), random.random())  # noqa: E731, NPY002
    if resume:
        train_small(small_model(), tmp_path / "checkpoint.pt")
    drawn = {}
    for seed in (7, 8):
        model = small_model(dropout=0.5)
        for trained in (False, True):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            if trained:
                path = tmp_path / ("checkpoint.pt" if resume else f"{seed}.pt")
                train_small(model, path, resume=resume)
            drawn[seed, trained] = draw()
    assert drawn[7, False] == drawn[7, True] != drawn[8, True] == drawn[8, False]


def test_a_failed_run_also_gives_the_random_state_back(tmp_path):
    model, before = small_model(), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        train_small(model, tmp_path / "checkpoint.pt", loss=lambda *_: torch.rand(1) / (1 // 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_each_step_draws_its_own_random_numbers(tmp_path):
    """Dropout depends on recipe.seed and step, not on earlier draws, as in an evaluation."""
    drawn = []

    def drawing(model, inputs, targets):
        drawn.append(torch.rand(()).item())
        return loss(model, inputs, targets)

    def draws(seed, evaluate=evaluate):
        recipe = Recipe(steps=3, learning_rate=0.01, seed=seed, eval_every=1)
        drawn.clear()
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pt"
        train_small(small_model(), path, recipe, loss=drawing, evaluate=evaluate)
        return list(drawn)

    first = draws(1)
    assert draws(1, evaluate=lambda model: {"number": torch.rand(5).mean()}) == first
    assert len({*first, *draws(2)}) == 6


def test_the_history_has_mean_losses_since_the_last_point_and_training_mode_is_restored(tmp_path):
    losses, modes = [], []

    def recording(model, inputs, targets):
        value = loss(model, inputs, targets)
        losses.append(value.item())
        modes.append(model.training)
        return value

    model = small_model().eval()
    history, _ = train_small(model, tmp_path / "checkpoint.pt", loss=recording)
    for point, part in zip(history, (losses[:3], losses[3:6], losses[6:]), strict=True):
        assert point["train_loss"] == pytest.approx(sum(part) / len(part), rel=1e-5)
    assert history[-1].items() >= evaluate(model).items()
    assert modes == [True] * 7


def test_the_history_and_the_log_have_every_number_from_evaluate(tmp_path, capsys):
    numbers = {"test_loss": 0.75, "test_accuracy": 0.5}
    history, _ = train_small(
        small_model(), tmp_path / "checkpoint.pt", evaluate=lambda model: dict(numbers)
    )
    assert [list(point) for point in history] == [["step", "train_loss", *numbers]] * 3
    assert all(point.items() >= numbers.items() for point in history)
    assert "test loss 0.750   test accuracy 0.500" in capsys.readouterr().out


@pytest.mark.parametrize(("bfloat16", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_the_recipe_decides_the_precision_of_the_loss_not_of_the_weights(bfloat16, dtype, tmp_path):
    dtypes = []

    def recording(model, inputs, targets):
        dtypes.append(model(inputs)[0].dtype)
        return loss(model, inputs, targets)

    model = small_model()
    recipe = Recipe(steps=2, learning_rate=0.01, bfloat16=bfloat16)
    train_small(model, tmp_path / "checkpoint.pt", recipe, loss=recording)
    assert dtypes == [dtype] * 2
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_step_is_clipped_adamw_at_the_recipe_s_learning_rate(tmp_path):
    recipe = Recipe(3, learning_rate=0.01, warmup=2, weight_decay=0.5, beta2=0.9, clip=0.3)
    fitted, model = small_model().double(), small_model().double()
    train_small(fitted, tmp_path / "checkpoint.pt", recipe)

    first = [torch.zeros_like(parameter) for parameter in model.parameters()]
    second = [torch.zeros_like(parameter) for parameter in model.parameters()]
    norms = []
    for step in range(3):
        gradients = torch.autograd.grad(loss(model, *batch(step)), list(model.parameters()))
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        rate = 0.01 * min(1, (step + 1) / 2) * (1 - step / 3)
        for parameter, gradient, m, v in zip(
            model.parameters(), gradients, first, second, strict=True
        ):
            gradient = gradient * min(1.0, 0.3 / (norms[-1] + 1e-6))  # PyTorch's epsilon
            m.mul_(0.9).add_(0.1 * gradient)
            v.mul_(0.9).add_(0.1 * gradient**2)
            m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.9 ** (step + 1))
            decay = 0.5 if parameter.ndim >= 2 else 0.0
            with torch.no_grad():
                parameter -= rate * (m_hat / (v_hat.sqrt() + 1e-8) + decay * parameter)
    assert min(norms) > 0.3  # every step is clipped
    for (name, parameter), other in zip(fitted.named_parameters(), model.parameters(), strict=True):
        assert_close(parameter, other, rtol=1e-9, atol=1e-9, msg=name)


def test_a_recipe_without_warm_up_and_clipping(tmp_path):
    """0 is off: full rate at once, and the same steps as with a limit that is never reached."""
    assert Recipe(5, 0.1, warmup=0).learning_rate_at(0, 0.5) == 0.5
    heads = {}
    for clip in (0.0, 1e-3, 1e9):
        recipe = Recipe(2, 0.01, warmup=0, clip=clip, beta2=0.5)
        train_small(model := small_model(), tmp_path / f"{clip}.pt", recipe)
        heads[clip] = model.head.weight
    assert torch.equal(heads[0.0], heads[1e9]) and not torch.equal(heads[0.0], heads[1e-3])


@pytest.mark.parametrize("muon", [None, 0.02])
def test_frozen_and_unused_parameters_do_not_change(muon, tmp_path):
    """Also through a checkpoint."""
    model = small_model()
    model.blocks[0].mlp.requires_grad_(False)
    model.unused = nn.Linear(3, 3)
    fixed = [*model.blocks[0].mlp.parameters(), *model.unused.parameters()]
    before, head = [fix.clone() for fix in fixed], model.head.weight.clone()
    recipe = Recipe(steps=4, learning_rate=0.01, muon=muon, eval_every=2)
    train_small(model, tmp_path / "checkpoint.pt", recipe)
    assert all(map(torch.equal, fixed, before)) and not torch.equal(model.head.weight, head)
    train_small(model, tmp_path / "checkpoint.pt", recipe, resume=True)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_training_restores_every_module_s_mode(fails, training, tmp_path):
    """During training, a block keeps its evaluation mode if the model was in training mode."""

    def recording(model, inputs, targets):
        modes_seen.append(model.blocks[0].training)
        return loss(model, inputs, targets) / (0 if fails and len(modes_seen) == 5 else 1)

    def careless(model):
        model.train()
        return evaluate(model)

    model, modes_seen = small_model().train(training), []
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    try:
        train_small(model, tmp_path / "checkpoint.pt", loss=recording, evaluate=careless)
        assert not fails
    except UsageError:  # the loss is not finite
        assert fails
    assert [module.training for module in model.modules()] == modes
    assert set(modes_seen) == {not training}


def test_training_does_not_depend_on_torch_s_defaults(tmp_path):
    expected, _ = train_small(small_model(), tmp_path / "whole.pt")
    for dtype in (torch.float64, torch.bfloat16):
        model = small_model()
        with ambient(dtype, "cpu"):
            actual, _ = train_small(model, tmp_path / f"{dtype}.pt")
        assert actual == expected


# --- torch.compile -------------------------------------------------------------------------------


@pytest.fixture
def compiles(monkeypatch):
    """The compiled objects, plus "graph" for each graph that runs. Needs no compiler."""
    seen, real = [], torch.compile

    def backend(graph, _):
        seen.append("graph")
        return graph

    monkeypatch.setattr(torch, "compile", lambda x: (seen.append(x), real(x, backend=backend))[1])
    return seen


@pytest.mark.parametrize("first", [False, True])
def test_compiled_training_is_the_same_training_and_either_resumes_the_other(
    first, compiles, tmp_path
):
    """Only training is compiled: the plain model is evaluated and saved."""
    path, seen = tmp_path / "checkpoint.pt", []

    def batch_until(step):
        if step == 4 and not seen.count("stopped"):
            seen.append("stopped")
            raise KeyboardInterrupt
        return batch(step)

    def recording(model):
        seen.append(model)
        return evaluate(model)

    model = small_model()
    with pytest.raises(KeyboardInterrupt):
        train_small(model, path, batch=batch_until, evaluate=recording, compile=first)
    history, _ = train_small(
        model, path, batch=batch_until, evaluate=recording, resume=True, compile=not first
    )
    expected, _ = train_small(small_model(), tmp_path / "whole.pt")
    for point, other in zip(history, expected, strict=True):
        assert point == pytest.approx(other, rel=1e-4)
    assert [x for x in compiles if x != "graph"] == [model]
    assert compiles[-1] == "graph"  # the compiled model also ran
    assert all(x is model for x in seen if x != "stopped")
