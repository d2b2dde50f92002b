import argparse
import datetime
import errno
import io
import itertools
import json
import math
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from faults import tensors_of
from torch import nn
from torch.testing import assert_close

from nala_min import LMConfig, NaLaLM, NaLaViT, ViTConfig, runcard, train
from nala_min.flags import UsageError, flag, parse_flags, run_script
from nala_min.train import Recipe, fit

pytestmark = pytest.mark.usefixtures("one_thread")


# --- Flags ---------------------------------------------------------------------------------------


@dataclass
class Flags:
    """What this script is for."""

    name: str = flag("word", "what it is called", ["word", "other"])
    size: int = flag(3, "how large it is")
    rate: float | None = flag(None, "how fast it is")
    file: Path | None = flag(None, "where it is")
    go_on: bool = flag(False, "whether it goes on")


def test_without_flags_every_field_has_its_default():
    assert parse_flags(Flags, []) == Flags("word", 3, None, None, False)


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--name", "other"], "name", "other"),
        (["--size", "-7"], "size", -7),
        (["--size=7"], "size", 7),
        (["--rate", "1"], "rate", 1.0),
        (["--file", "a b/c"], "file", Path("a b/c")),
        (["--go-on"], "go_on", True),
    ],
)
def test_a_flag_sets_its_field_with_the_field_s_type(argv, field, value):
    flags = parse_flags(Flags, argv)
    assert getattr(flags, field) == value
    assert type(getattr(flags, field)) is type(value)
    setattr(flags, field, getattr(Flags(), field))
    assert flags == Flags()


def test_flags_are_read_from_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--size", "4"])
    assert parse_flags(Flags).size == 4


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--bogus"], "--bogus"),
        (["positional"], "positional"),
        (["--name", "third"], "--name"),
        (["--size", "many"], "--size"),
        (["--size", "1.5"], "--size"),
        (["--size"], "--size"),
        (["--rate", "fast"], "--rate"),
        (["--go-on=1"], "--go-on"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(argv, named, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_flags(Flags, argv)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    assert "error" in err and named in err


def test_help_has_the_description_every_flag_and_the_defaults(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_flags(Flags, ["--help"])
    assert exit.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert Flags.__doc__ in out
    for name in ("--name", "--size", "--rate", "--file", "--go-on"):
        assert name in out
    assert "(default: 3)" in out and "(default: word)" in out
    assert "None" not in out and "False" not in out


@dataclass
class Run(train.Settings):
    """A run of something small."""

    NAME = "toy"
    PRESETS = {  # noqa: RUF012
        "cpu": dict(
            steps=50, batch=2, lr=0.5, dropout=0.0, layers=2, heads=2, dim=8, width=8, shift=1
        ),
        "gpu": dict(
            steps=70, batch=4, lr=0.25, dropout=0.2, layers=4, heads=3, dim=12, width=16, shift=2
        ),
    }

    width: int | None = flag(None, "how wide it is")
    shift: int | None = flag(None, "how far it moves", zero=True)
    words: str = flag("", "what it says", decides=False)


def test_a_preset_gives_what_the_flags_do_not():
    run = parse_flags(Run, ["--preset", "gpu", "--steps", "3", "--dropout", "0"])
    assert (run.steps, run.batch, run.lr, run.dropout, run.width) == (3, 4, 0.25, 0.0, 16)
    assert (run.layers, run.heads, run.dim, run.shift) == (4, 3, 12, 2)
    assert parse_flags(Run, ["--preset", "gpu"]).out == Path("runs") / "toy_gpu_nala_seed1"
    assert run.out == Path("runs") / "toy_gpu_nala_seed1_steps3_dropout0"  # nothing overwritten
    assert parse_flags(Run, ["--out", "here"]).out == Path("here")


def test_attentions_of_several_blocks_make_one_folder_without_commas():
    flags = ["--preset", "cpu", "--attention", "nala,softmax"]
    assert parse_flags(Run, flags).out == Path("runs") / "toy_cpu_nala-softmax_seed1"


@pytest.mark.parametrize(
    ("attention", "names"),
    [("elu", ("elu", "elu")), ("nala,softmax", ("nala", "softmax")), ("relu,relu", ("relu",) * 2)],
)
def test_block_options_are_what_both_configs_take(attention, names):
    flags = ["--preset", "cpu", "--attention", attention, "--dropout", "0.25"]
    options = train.block_options(parse_flags(Run, flags).config())
    for config in (LMConfig(vocab_size=5, **options), ViTConfig(**options)):
        sizes = (config.num_layers, config.num_heads, config.dim, config.dropout)
        assert sizes == (2, 2, 8, 0.25)
        assert config.attentions == names


@pytest.mark.parametrize(("cuda", "preset", "steps"), [(True, "gpu", 70), (False, "cpu", 50)])
def test_the_preset_is_chosen_by_whether_there_is_cuda(cuda, preset, steps, machine):
    machine(cuda, False)
    run = parse_flags(Run, [])
    assert (run.preset, run.steps) == (preset, steps)


def test_the_help_of_a_preset_flag_has_both_values(capsys):
    with pytest.raises(SystemExit):
        parse_flags(Run, ["--help"])
    assert "how wide it is (cpu: 8, gpu: 16)" in capsys.readouterr().out


def test_the_config_is_what_decides_the_result():
    flags = ["--preset", "cpu", "--words", "hi", "--out", "o", "--device", "cpu", "--resume"]
    assert parse_flags(Run, [*flags, "--seed", "3", "--attention", "elu"]).config() == {
        "preset": "cpu",
        "attention": "elu",
        "seed": 3,
        "steps": 50,
        "batch": 2,
        "lr": 0.5,
        "dropout": 0.0,
        "layers": 2,
        "heads": 2,
        "dim": 8,
        "width": 8,
        "shift": 1,
    }


@pytest.mark.parametrize(("steps", "every"), [("1", 1), ("9", 1), ("50", 5), ("59", 5)])
@pytest.mark.parametrize(("device", "bfloat16"), [("cpu", False), ("cuda", True), ("mps", False)])
def test_the_recipe_of_settings(steps, every, device, bfloat16):
    recipe = parse_flags(Run, ["--preset", "cpu", "--steps", steps]).recipe(torch.device(device))
    assert recipe == Recipe(int(steps), 0.5, eval_every=every, bfloat16=bfloat16)


@pytest.mark.parametrize(
    "argv",
    [
        ["--steps", "0"],
        ["--batch", "-1"],
        ["--lr", "nan"],
        ["--lr", "0"],
        ["--width", "0"],
        ["--width", "-3"],
        ["--shift", "-1"],
        ["--layers", "0"],
        ["--heads", "0"],
        ["--heads", "3"],
        ["--dim", "0"],
        ["--dim", "9"],
        ["--dropout", "inf"],
        ["--lr", "inf"],
        ["--attention", "fast"],
        ["--attention", "nala,fast"],
        ["--attention", "nala,"],
        ["--attention", "nala,nala,nala"],
        ["--attention", "softmax,nala", "--layers", "3"],
        ["--dropout", "1"],
        ["--dropout", "-0.1"],
        ["--dropout", "nan"],
        ["--seed", "-1"],
    ],
)
def test_settings_that_no_run_can_have_are_a_mistake_that_names_the_flag(argv):
    with pytest.raises(UsageError, match=argv[0]):
        parse_flags(Run, ["--preset", "cpu", *argv])


@pytest.mark.parametrize("name", ["dropout", "shift"])
def test_only_what_may_be_zero_may_be_zero(name):
    assert getattr(parse_flags(Run, [f"--{name}", "0"]), name) == 0
    with pytest.raises(UsageError, match=f"--{name} -1.* is not 0 or more and below"):
        parse_flags(Run, [f"--{name}", "-1"])
    with pytest.raises(UsageError, match="--width 0 is not positive and below"):
        parse_flags(Run, ["--width", "0"])


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--heads", "3"], "num_heads=3 does not divide dim=8"),
        (["--attention", "nala,fast"], "attention='fast' is not one of"),
        (["--attention", "nala,elu,nala"], "names 3 blocks, not num_layers=2"),
    ],
)
def test_blocks_that_do_not_fit_together_say_why(argv, reason):
    with pytest.raises(UsageError, match=reason):
        parse_flags(Run, ["--preset", "cpu", *argv])


# --- Exit codes and devices ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("--size 0 is too small"), 2, "script.py: error: --size 0 is too small\n"),
        (KeyboardInterrupt(), 130, "script.py: interrupted: --resume goes on from the last"),
        (KeyboardInterrupt("interrupted, saved"), 130, "script.py: interrupted, saved\n"),
        (
            OSError(28, "No space left", "card.json"),
            1,
            "error: [Errno 28] No space left: 'card.json'\n",
        ),
        (MemoryError(), 1, "script.py: error: out of memory: make the batch, the model or the"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nto"),
            1,
            "script.py: error: out of memory",
        ),
    ],
)
def test_a_script_turns_a_mistake_into_one_line_and_an_exit_code(
    error, code, line, monkeypatch, capsys
):
    def main():
        raise error

    monkeypatch.setattr("sys.argv", ["/somewhere/script.py"])
    with pytest.raises(SystemExit) as exit:
        run_script(main)
    assert exit.value.code == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert line in err and err.startswith("script.py: ")


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_script_s_bug_is_not_called_a_mistake_of_the_user(kind):
    def main():
        raise kind("a bug")

    with pytest.raises(kind, match="a bug"):
        run_script(main)


def test_a_model_too_large_for_the_machine_is_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_script(lambda: torch.empty(2**50))
    assert "error: out of memory" in capsys.readouterr().err


def test_a_script_prints_to_a_console_that_lacks_the_characters(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", console)
    run_script(lambda: print("5 €"))
    console.flush()
    assert console.buffer.getvalue() == b"5 ?\n"


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
        ("auto", True, False, "cuda"),
        ("auto", True, True, "cuda"),
        ("auto", False, True, "mps"),
        ("cpu", True, True, "cpu"),
        ("mps", True, True, "mps"),
        ("cuda", True, False, "cuda"),
    ],
)
def test_choose_device_takes_the_named_one_or_the_best(name, cuda, mps, chosen, machine):
    machine(cuda, mps)
    assert train.choose_device(name) == torch.device(chosen)


@pytest.mark.parametrize(
    ("name", "cuda", "mps"), [("cuda", False, True), ("cuda", False, False), ("mps", True, False)]
)
def test_choose_device_refuses_one_that_is_not_there(name, cuda, mps, machine):
    machine(cuda, mps)
    with pytest.raises(UsageError, match=f"--device {name}"):
        train.choose_device(name)


# --- Files ---------------------------------------------------------------------------------------


def test_write_whole_writes_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old and longer")
    runcard.write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_write_whole_keeps_the_old_file_if_the_writer_breaks_half_way(tmp_path):
    def write(file):
        file.write(b"ne")
        file.flush()
        raise OSError("disk full")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        runcard.write_whole(path, write)
    assert path.read_bytes() == b"old"


def test_a_checkpoint_of_another_script_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": train.FORMAT, "extra": {"patch": 4}}, path)
    assert train.load_checkpoint(path, "patch")["extra"] == {"patch": 4}
    with pytest.raises(UsageError, match="another script"):
        train.load_checkpoint(path, "patch", "characters")


def test_load_checkpoint_reads_what_was_saved(tmp_path):
    saved = {"format": train.FORMAT, "model": {"weight": torch.randn(3)}, "text": "ä"}
    torch.save(saved, tmp_path / "checkpoint.pt")
    loaded = train.load_checkpoint(tmp_path / "checkpoint.pt")
    assert torch.equal(loaded["model"].pop("weight"), saved["model"].pop("weight"))
    assert loaded == saved


def truncated(path):
    torch.save({"model": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


DAMAGES = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"garbage\n" * 100),
    "truncated": truncated,
    "code": lambda path: torch.save({"model": argparse.Namespace()}, path),
    "folder": lambda path: path.mkdir(),
    "a file of something else": lambda path: torch.save({"model": torch.zeros(3)}, path),
    "another version": lambda path: torch.save({"format": train.FORMAT + 1}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_does_not_load_is_one_line_that_names_it(damage, tmp_path):
    path = tmp_path / "checkpoint.pt"
    DAMAGES[damage](path)
    with pytest.raises(UsageError) as error:
        train.load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value).strip()


def test_a_run_card_says_what_ran_on_what_and_survives_json(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/script.py", "--prompt", "a b", "--steps", "3"])
    config, data, results = {"dim": 16}, {"name": "Märchen"}, {"loss": 0.1, "history": [{"s": 1}]}
    card = runcard.run_card(config, data, torch.device("cpu"), 1.26, results)
    runcard.write_json(tmp_path / "card.json", card)
    assert json.loads((tmp_path / "card.json").read_text(encoding="utf-8")) == card
    assert runcard.read_json(tmp_path / "card.json") == card
    assert list(tmp_path.iterdir()) == [tmp_path / "card.json"]
    assert card["command"] == "python script.py --prompt 'a b' --steps 3"
    assert (card["config"], card["data"], card["results"]) == (config, data, results)
    assert card["seconds"] == 1.3
    assert card["versions"].keys() == {"python", "torch", "numpy"}
    assert card["versions"]["torch"] == version("torch")
    assert card["hardware"]["device"] and card["hardware"]["threads"] == torch.get_num_threads()
    assert datetime.date.fromisoformat(card["date"]) >= datetime.date(2025, 1, 1)


@pytest.mark.parametrize(
    ("config", "sha256", "sentence"),
    [
        ({"dim": 16, "seed": 1}, "a", "Expect a test loss of about 1.25 (1.000 to 1.500 in 2 "),
        ({"dim": 16, "seed": 7}, "a", "Expect a test loss of about 1.25 (1.000 to 1.500 in 2 "),
        ({"dim": 16, "seed": 1}, "b", "Expect a test loss of about 9.00 (9.000 to 9.000 in 1 "),
        ({"dim": 16, "seed": 1}, "c", "No committed run"),
        ({"dim": 32, "seed": 1}, "a", "No committed run"),
        ({"dim": 16, "seed": 1, "more": 1}, "a", "No committed run"),
    ],
)
def test_what_to_expect_is_read_off_the_cards_of_the_same_config_and_data(
    config, sha256, sentence, tmp_path, monkeypatch
):
    monkeypatch.setattr(runcard, "RESULTS", tmp_path)
    losses = {"run_1": (1, "a", 1.0), "run_2": (2, "a", 1.5), "run_3": (1, "b", 9.0)}
    for name, (seed, data, loss) in (losses | {"other": (1, "a", 5.0)}).items():
        card = {"config": {"dim": 16, "seed": seed}, "data": {"sha256": data}}
        runcard.write_json(tmp_path / f"{name}.json", card | {"results": {"test_loss": loss}})
    assert runcard.expected("run_*", config, sha256, "test_loss").startswith(sentence)


# --- Recipe and optimiser ------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_decays_along_a_cosine_to_a_tenth():
    recipe = Recipe(steps=1000, learning_rate=0.5, warmup=10)
    rates = [recipe.learning_rate_at(step, 2.0) / 2.0 for step in range(1000)]
    for step in range(10):
        assert rates[step] == pytest.approx((step + 1) / 10, rel=1e-3)
    assert max(rates) <= 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[250] == pytest.approx(0.1 + 0.9 * (0.5 + math.sqrt(0.125)))
    assert rates[500] == pytest.approx(0.55)
    assert rates[999] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 3, 100, 150])
def test_the_learning_rate_is_never_zero_negative_or_above_its_peak(steps):
    recipe = Recipe(steps, learning_rate=0.5)
    assert all(0 < recipe.learning_rate_at(step, 0.5) <= 0.5 for step in range(steps))


def small_model(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return NaLaLM(LMConfig(vocab_size=11, num_layers=1, num_heads=2, dim=16, dropout=dropout))


def small_vit():
    return NaLaViT(ViTConfig(num_layers=1, num_heads=2, dim=16, norm_scale=None))


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
def test_muon_takes_the_matrices_between_the_ends_of_a_model(make):
    """Every parameter in one group: matrices and convolutions to Muon, embedding, head, biases and
    gains to AdamW."""
    model = make()
    recipe = Recipe(3, 0.25, muon=0.5, weight_decay=0.125)
    adam, muon = train.make_optimizers(model, recipe)
    groups = [(opt, group) for opt in (adam, muon) for group in opt.param_groups]
    found = [id(p) for _, group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    kind = {id(p): (opt, group["weight_decay"]) for opt, group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            want = adam, 0.0
        else:
            want = (adam if name in ("embed.weight", "head.weight") else muon), 0.125
        assert kind[id(parameter)] == want, name
    assert {group["lr"] for group in adam.param_groups} == {0.25}
    assert {group["lr"] for group in muon.param_groups} == {0.5}


@pytest.mark.parametrize("shape", [(6, 6), (5, 40), (40, 5), (8, 1)])
def test_orthogonal_keeps_the_directions_and_evens_out_the_singular_values(shape):
    """Against the singular value decomposition, for a matrix of any size and scale."""
    short = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, short, dtype=torch.float64))[0] for n in shape)
    values = torch.linspace(1.0, 0.05, short, dtype=torch.float64)
    for scale in (1e-4, 1.0, 1e4):
        spectrum = u.mT @ train.orthogonal(scale * u @ values.diag() @ v.mT) @ v
        assert ((spectrum.diag() > 0.6) & (spectrum.diag() < 1.25)).all()
        assert_close(spectrum, spectrum.diag().diag())


def test_muon_steps_by_hand():
    """Nesterov's momentum, made orthogonal; a convolution counts as a matrix with a row for each
    of its outputs, and a tall one steps further."""
    weights = [torch.randn(6, 2, dtype=torch.float64), torch.randn(4, 3, 2, 2).double()]
    fitted = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = train.Muon(fitted, lr=0.5, weight_decay=0.25)
    momenta = [torch.zeros_like(weight) for weight in weights]
    for _ in range(3):
        for i, parameter in enumerate(fitted):
            gradient = parameter.grad = torch.randn_like(parameter)
            momenta[i] = 0.95 * momenta[i] + 0.05 * gradient
            ahead = 0.05 * gradient + 0.95 * momenta[i]
            turn = train.orthogonal(ahead.reshape(len(ahead), -1)).reshape(ahead.shape)
            tall = math.sqrt(3) if i == 0 else 1.0
            weights[i] = (1 - 0.5 * 0.25) * weights[i] - 0.5 * tall * turn
        optimizer.step()
    for parameter, weight in zip(fitted, weights, strict=True):
        assert_close(parameter.data, weight)


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
    """fit with the functions above, and what options put in their place."""
    options = dict(batch=batch, loss=loss, evaluate=evaluate, extra=EXTRA) | options
    recipe = recipe or Recipe(steps=7, learning_rate=0.01, warmup=2, eval_every=3)
    return fit(model, recipe, checkpoint=path, **options)


def until(stop, number=signal.SIGINT, times=1):
    """A batch function in whose step stop the signal comes."""

    def interrupted(step):
        if step == stop:
            for _ in range(times):
                signal.raise_signal(number)
        return batch(step)

    return interrupted


SIGNALS = [signal.SIGINT, signal.SIGTERM]


def assert_same_run(one, other):
    """Two checkpoints hold the same, but for the time that it took, to the last bit."""
    saved, again = train.load_checkpoint(one), train.load_checkpoint(other)
    assert saved.keys() == again.keys()
    for name in ("format", "step", "history", "extra"):
        assert saved[name] == again[name]
    saved, again = tensors_of(saved), tensors_of(again)
    assert saved.keys() == again.keys()
    assert any("exp_avg_sq" in name for name in saved)
    for name in saved:
        assert torch.equal(saved[name], again[name]), name


@pytest.mark.parametrize(
    ("stop", "number", "muon"),
    [
        (0, *SIGNALS[:1], None),
        (3, *SIGNALS[1:], None),
        (5, *SIGNALS[:1], 0.02),
        (6, *SIGNALS[1:], None),
    ],
)
def test_a_stopped_run_is_saved_and_goes_on_to_the_very_same_bits(stop, number, muon, tmp_path):
    recipe = Recipe(steps=7, learning_rate=0.01, muon=muon, warmup=2, eval_every=3)
    whole = small_model(seed=1, dropout=0.2)
    history, _ = train_small(whole, tmp_path / "whole.pt", recipe)

    handlers = [signal.getsignal(each) for each in SIGNALS]
    stopped = small_model(seed=1, dropout=0.2)
    with pytest.raises(KeyboardInterrupt, match=f"goes on from step {stop + 1}$"):
        train_small(stopped, tmp_path / "parts.pt", recipe, batch=until(stop, number))
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    assert train.load_checkpoint(tmp_path / "parts.pt")["step"] == stop + 1

    torch.manual_seed(17)  # another random state
    resumed, seen = small_model(seed=2, dropout=0.2), []
    resumed_history, _ = train_small(
        resumed,
        tmp_path / "parts.pt",
        recipe,
        batch=lambda step: (seen.append(step), batch(step))[1],
        resume=True,
    )
    assert seen == list(range(stop + 1, 7))
    assert [point["step"] for point in history] == [3, 6, 7]
    assert resumed_history == history
    assert_same_run(tmp_path / "whole.pt", tmp_path / "parts.pt")
    weights = (model.state_dict().values() for model in (whole, resumed))
    assert all(map(torch.equal, *weights))


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="at step 4: --resume goes on from step 3"):
        train_small(small_model(), tmp_path / "parts.pt", batch=until(4, times=2))
    train_small(small_model(), tmp_path / "whole.pt")
    train_small(small_model(seed=2), tmp_path / "parts.pt", resume=True)
    assert_same_run(tmp_path / "whole.pt", tmp_path / "parts.pt")


def test_ctrl_c_while_the_first_checkpoint_is_written_says_how_to_go_on(tmp_path, monkeypatch):
    """Whoever sees a checkpoint may stop the run, before its first step too."""
    write = train.write_whole

    def interrupted(path, function):
        write(path, function)
        monkeypatch.setattr(train, "write_whole", write)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"at step 1: --resume goes on from step 1$"):
        train_small(small_model(), tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_script_stopped_after_training_says_how_to_go_on(number, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="130"):
            run_script(lambda: signal.raise_signal(number))
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert "--resume goes on from the last checkpoint" in capsys.readouterr().err


def test_a_second_sigterm_waits(tmp_path):
    """Launchers send it to a process and to its parent, which hands it on."""
    with pytest.raises(KeyboardInterrupt, match="goes on from step 5"):
        train_small(small_model(), tmp_path / "parts.pt", batch=until(4, signal.SIGTERM, times=2))


def test_training_in_another_thread_leaves_signals_alone(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        history, _ = pool.submit(train_small, small_model(), tmp_path / "checkpoint.pt").result()
    assert [point["step"] for point in history] == [3, 6, 7]


def test_each_step_and_process_draws_its_own_random_numbers(tmp_path, monkeypatch):
    """Dropout depends on recipe.seed, step and process, not on what was drawn before."""
    drawn = []

    def drawing(model, inputs, targets):
        drawn.append(torch.rand(()).item())
        return loss(model, inputs, targets)

    def draws(seed, rank):
        recipe = Recipe(steps=3, learning_rate=0.01, seed=seed)
        drawn.clear()
        monkeypatch.setattr(train.distributed, "rank", lambda: rank)
        monkeypatch.setattr(train.distributed, "share", lambda batch: batch)
        train_small(small_model(), tmp_path / f"{seed}{rank}.pt", recipe, loss=drawing)
        return list(drawn)

    first = draws(1, 0)
    torch.rand(5)
    assert draws(1, 0) == first
    others = [first, draws(2, 0), draws(1, 1)]
    assert len({number for some in others for number in some}) == sum(map(len, others))


def test_a_finished_run_resumes_to_itself(tmp_path):
    path, steps = tmp_path / "checkpoint.pt", []
    history, _ = train_small(small_model(), path)
    expected, before = train.load_checkpoint(path)["model"], path.read_bytes()
    model = small_model(seed=2)
    assert train_small(model, path, resume=True, batch=steps.append)[0] == history
    assert steps == []
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert path.read_bytes() == before


def test_the_seconds_of_a_resumed_run_count_from_its_first_start(tmp_path, monkeypatch):
    path, clock = tmp_path / "checkpoint.pt", itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    train_small(small_model(), path)
    saved = train.load_checkpoint(path)["seconds"]
    assert saved > 1
    assert train_small(small_model(), path, resume=True)[1] == saved + 1


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (EXTRA | {"attention": "softmax"}, "attention"),
        (EXTRA | {"dim": 32}, "dim"),
        (EXTRA | {"seed": 1}, "seed"),
        ({"attention": "nala", "dim": 16}, "text"),
    ],
)
def test_a_run_of_another_kind_does_not_resume(extra, named, tmp_path):
    train_small(small_model(), tmp_path / "checkpoint.pt")
    with pytest.raises(UsageError, match=rf"--resume.* {named} = "):
        train_small(small_model(), tmp_path / "checkpoint.pt", extra=extra, resume=True)


def test_a_run_without_a_checkpoint_does_not_resume(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint"):
        train_small(small_model(), tmp_path / "checkpoint.pt", resume=True)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path):
    recipe = Recipe(steps=9, learning_rate=1e30, warmup=2, eval_every=3)
    with pytest.raises(UsageError, match="not finite at step 3: lower --lr"):
        train_small(small_model(), tmp_path / "checkpoint.pt", recipe)
    assert train.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_an_evaluation_that_is_not_finite_ends_the_run_too(broken, tmp_path):
    numbers = {"test_accuracy": 0.5, "test_loss": broken}
    with pytest.raises(UsageError, match="not finite at step 3: lower --lr"):
        train_small(small_model(), tmp_path / "checkpoint.pt", evaluate=lambda model: dict(numbers))
    assert train.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0


def test_a_stop_after_a_loss_that_is_not_finite_saves_nothing(tmp_path):
    recipe = Recipe(steps=9, learning_rate=1e30, warmup=2, eval_every=9)
    with pytest.raises(UsageError, match="not finite at step 5: lower --lr"):
        train_small(small_model(), tmp_path / "checkpoint.pt", recipe, batch=until(4))
    assert train.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0


def test_a_run_that_is_not_finished_is_not_overwritten(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train_small(small_model(), path, batch=until(3))
    before = path.read_bytes()
    with pytest.raises(UsageError, match="has come to step 4 of 7: --resume goes on with it"):
        train_small(small_model(), path)
    assert path.read_bytes() == before


def test_another_run_is_not_overwritten_but_the_same_one_is_made_again(tmp_path):
    path = tmp_path / "checkpoint.pt"
    history, _ = train_small(small_model(), path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="trained with dim = 16, not 32: delete it, or name"):
        train_small(small_model(), path, extra=EXTRA | {"dim": 32})
    path.with_name("other.pt").write_bytes(b"something else")
    with pytest.raises(UsageError, match=r"no checkpoint of this version .* delete it, or name"):
        train_small(small_model(), path.with_name("other.pt"))
    assert path.read_bytes() == before
    assert train_small(small_model(), path)[0] == history


@pytest.mark.parametrize("stop", [0, 2])
def test_a_full_disk_is_one_line_and_the_run_goes_on_from_the_last_checkpoint(
    stop, tmp_path, monkeypatch
):
    """In the first checkpoint or a later one, half of which is written."""
    write, count = train.write_whole, itertools.count()

    def full(path, fill):
        def half(file):
            fill(file)
            if next(count) == stop:
                file.truncate(file.tell() // 2)
                raise OSError(errno.ENOSPC, "No space left on device")

        write(path, half)

    monkeypatch.setattr(train, "write_whole", full)
    path = tmp_path / "run" / "checkpoint.pt"
    mend = ["mend that, or name another folder with --out", "", "--resume goes on from step 3"]
    with pytest.raises(
        UsageError, match=f"cannot be written .*No space left.*{mend[stop]}"
    ) as error:
        train_small(small_model(), path)
    assert "\n" not in str(error.value)
    train_small(small_model(), path, resume=stop > 0)
    train_small(small_model(), tmp_path / "whole.pt")
    assert_same_run(tmp_path / "whole.pt", path)
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_one_line_before_any_training(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"cannot be written .*name another folder with --out"):
        train_small(small_model(), tmp_path / "file" / "checkpoint.pt", batch=None)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_the_checkpoint_is_written_at_every_evaluation(tmp_path):
    path, steps = tmp_path / "checkpoint.pt", []

    def look(step):
        steps.append(train.load_checkpoint(path)["step"] if path.exists() else 0)
        return batch(step)

    train_small(small_model(), path, batch=look)
    assert steps == [0, 0, 0, 3, 3, 3, 6]
    saved = train.load_checkpoint(path)
    assert saved["step"] == 7 and saved["extra"] == EXTRA


def test_the_history_has_mean_losses_since_the_last_point_and_training_goes_on_in_its_mode(
    tmp_path,
):
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


def test_the_history_has_every_number_that_evaluate_gives_and_the_log_names_them(tmp_path, capsys):
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
        rate = 0.01 * min(1, (step + 1) / 2) * (0.55 + 0.45 * math.cos(math.pi * step / 3))
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
    assert min(norms) > 0.3  # the clipping bites
    for (name, parameter), other in zip(fitted.named_parameters(), model.parameters(), strict=True):
        assert_close(parameter, other, rtol=1e-9, atol=1e-9, msg=name)
