"""Training: the recipe, AdamW and Muon are the formulas, and the loop draws, reports and restores
what it says."""

import math
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import training
from torch import nn
from torch.testing import assert_close
from training import batch, evaluate, loss, noting, small_model, train_small

from nala_min import distributed, train
from nala_min.flags import UsageError
from nala_min.train import Recipe

signals_stay_inside = training.signals_stay_inside


@pytest.mark.parametrize(
    ("name", "cards", "mps", "processes", "chosen"),
    [("auto", 0, False, 1, "cpu"), ("auto", 1, True, 1, "cuda"), ("auto", 0, True, 1, "mps"),
     ("cpu", 1, True, 1, "cpu"), ("mps", 1, True, 1, "mps"), ("cuda", 0, True, 1, None),
     ("mps", 1, False, 1, None), ("auto", 2, False, 2, "cuda:1"), ("cuda", 1, True, 2, None),
     ("auto", 1, False, 2, None), ("mps", 0, True, 2, None), ("auto", 0, True, 2, "cpu")],
)  # fmt: skip
def test_the_device_is_the_named_one_or_the_best(name, cards, mps, processes, chosen, monkeypatch):
    """This is the second process, if there are several: it takes the second card."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    monkeypatch.setenv("LOCAL_RANK", "1")
    if chosen is None:
        with pytest.raises(UsageError, match="is not available here"):
            train.choose_device(name)
    else:
        assert train.choose_device(name) == torch.device(chosen)
        assert taken == ([1] if chosen == "cuda:1" else [])


def test_the_recipe_s_defaults_are_those_of_the_committed_cards():
    named = {"warmup": 100, "weight_decay": 0.1, "beta2": 0.99, "clip": 1.0, "eval_every": 500}
    named |= {"muon": None, "schedule": "linear", "bfloat16": False, "seed": 1}
    assert vars(Recipe(5, 0.25)) == {"steps": 5, "learning_rate": 0.25} | named


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", {0: 0.2, 4: 0.996, 9: 1.982, 250: 1.5, 500: 1.0, 999: 0.002}),
        ("cosine", {0: 0.2, 250: 1.7363961, 500: 1.1, 750: 0.4636039, 999: 0.2000044}),
    ],
)
def test_the_learning_rate_warms_up_and_decays(schedule, rates):
    """From a peak of 2, linearly to zero or along a cosine to a tenth."""
    recipe = Recipe(steps=1000, learning_rate=0.5, warmup=10, schedule=schedule)
    for step, rate in rates.items():
        assert recipe.learning_rate_at(step, 2.0) == pytest.approx(rate, rel=1e-6), step
    assert Recipe(5, 0.5, warmup=0).learning_rate_at(0, 2.0) == 2.0


def test_a_recipe_without_sense_is_refused():
    good = {"steps": 1, "learning_rate": 0.0, "muon": 0.0, "warmup": 0, "weight_decay": 0.0}
    Recipe(**good, clip=0.0, eval_every=1)
    wrong = {"clip": -1.0, "warmup": -1, "eval_every": 0, "steps": 0, "schedule": "step"}
    wrong |= {"learning_rate": math.nan, "muon": -0.1, "beta2": 1.0, "bfloat16": "no"}
    more = ("steps", 3.5), ("steps", True), ("eval_every", np.int64(0)), ("clip", math.inf)
    for name, value in (*wrong.items(), *more, ("schedule", ["linear"]), ("seed", None)):
        with pytest.raises(ValueError, match=f"^{name} must be "):
            Recipe(**good | {name: value})


def jordan(x):
    """Five steps of Jordan's polynomial on the singular values of x, in float64."""
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / (s.norm() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ vt


@pytest.mark.parametrize(("muon", "clip"), [(None, 0.3), (0.0, 0.0), (0.05, 0.3)])
def test_a_step_is_adamw_or_muon_by_hand(muon, clip, tmp_path):
    """With warm-up, decay of matrices, clipping (0 is off) and Nesterov momentum. Muon sees a
    convolution as a matrix with one row per output channel, and takes longer steps for tall
    matrices. What is frozen or unused stays as it is."""
    fitted, model = small_model().double(), small_model().double()
    for each in (fitted, model):
        each.blocks[0].mlp[0].requires_grad_(False)
        each.unused = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    recipe = Recipe(3, 0.01, muon, warmup=2, weight_decay=0.5, beta2=0.9, clip=clip)
    train_small(fitted, tmp_path / "checkpoint.pt", recipe)

    trained = {n: x for n, x in model.named_parameters() if x.requires_grad and n != "unused"}
    first, second = ({name: torch.zeros_like(x) for name, x in trained.items()} for _ in range(2))
    for step, share in enumerate([1 / 2, 2 / 3, 1 / 3]):  # of the peak rate
        gradients = torch.autograd.grad(loss(model, *batch(step)), trained.values())
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm > 0.3
        for (name, weight), g in zip(trained.items(), gradients, strict=True):
            g = g * 0.3 / (norm + 1e-6) if clip else g  # PyTorch's epsilon
            m, v, rate = first[name], second[name], 0.01 * share
            if muon and weight.ndim > 1 and name not in ("embed.weight", "head.weight"):
                m.mul_(0.95).add_(0.05 * g)
                ahead, rate = (0.05 * g + 0.95 * m).flatten(1), muon * share
                stretch = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
                update = stretch * jordan(ahead).view_as(weight)
            else:
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.9).add_(0.1 * g**2)
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.9 ** (step + 1))
                update = m_hat / (v_hat.sqrt() + 1e-8)
            decay = 0.5 if weight.ndim > 1 else 0.0
            weight.data -= rate * (update + decay * weight.data)
    for (name, weight), other in zip(fitted.named_parameters(), model.parameters(), strict=True):
        assert_close(weight, other, rtol=1e-8, atol=1e-8, msg=name)
    assert not train.orthogonal(torch.zeros(2, 3)).any()  # a gradient of zero


@pytest.mark.parametrize("fails", [False, True])
def test_the_user_s_random_state_is_left_alone(fails, tmp_path):
    """PyTorch's, NumPy's and Python's, whether the run succeeds or fails."""
    state = lambda: (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())  # noqa: E731, NPY002
    model = small_model(dropout=0.5)
    before, path = state(), tmp_path / "checkpoint.pt"
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        train_small(model, path, loss=lambda *args: loss(*args) * (1 // (not fails)))
    assert state() == before


def test_each_step_draws_its_own_random_numbers(tmp_path):
    """Dropout depends on the recipe's seed and the step, not on earlier draws in an evaluation."""
    drawn, drawing = [], noting(lambda *_: drawn.append(torch.rand(()).item()), loss)
    for seed, numbers in ((1, 0), (1, 5), (2, 0)):
        recipe, path = Recipe(3, 0.01, seed=seed, eval_every=1), tmp_path / f"{seed}{numbers}.pt"
        options = {"evaluate": lambda model, n=numbers: {"sum": torch.rand(n).sum()}}
        train_small(small_model(), path, recipe, loss=drawing, **options)
    assert drawn[:3] == drawn[3:6] and len({*drawn}) == 6


def test_the_curve_and_the_log_have_the_mean_losses_and_every_number(tmp_path, capsys):
    losses, numbers = [], {"test_loss": 0.75, "test_accuracy": 0.5}
    recording = noting(lambda *args: losses.append(loss(*args).item()), loss)
    options = {"loss": recording, "evaluate": lambda model: dict(numbers)}
    history, seconds = train_small(small_model(), tmp_path / "checkpoint.pt", **options)
    means = {3: sum(losses[:3]) / 3, 6: sum(losses[3:6]) / 3, 7: losses[6]}
    for point, (step, mean) in zip(history, means.items(), strict=True):
        assert point == {"step": step, "train_loss": pytest.approx(mean, rel=1e-5)} | numbers
    assert 0 < seconds < 600
    out, err = capsys.readouterr()
    assert f"step     3   train loss {means[3]:.3f}   test loss 0.750   test accuracy 0.500" in out
    assert "7/7" in err and f"loss={losses[0]:.3f}" in err  # the bar


@pytest.mark.parametrize("bfloat16", [False, True])
def test_bfloat16_and_tf32_are_for_the_loss_only_and_only_if_the_recipe_says_so(bfloat16, tmp_path):
    """Weights stay float32, and the user's setting is given back however the run ends."""
    before, seen, model = torch.get_float32_matmul_precision(), [], small_model()

    def recording(model, inputs, targets):
        seen.append((model(inputs)[0].dtype, torch.get_float32_matmul_precision()))
        return loss(model, inputs, targets) * (1 // (len(seen) < 3))

    recipe = Recipe(5, 0.01, bfloat16=bfloat16)
    with pytest.raises(ZeroDivisionError):
        train_small(model, tmp_path / "checkpoint.pt", recipe, loss=recording)
    assert set(seen) == {(torch.bfloat16, "high") if bfloat16 else (torch.float32, before)}
    assert torch.get_float32_matmul_precision() == before
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_training_restores_every_module_s_mode(training, tmp_path):
    """While a model in training mode trains, its frozen block stays in evaluation mode. An
    evaluation starts in evaluation mode, and may change it."""
    seen, model = set(), small_model().train(training)
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    note = lambda model, *args: seen.add((len(args), model.training, model.blocks[0].training))  # noqa: E731
    careless = noting(note, lambda model: {"ready": model.train().training})
    train_small(model, tmp_path / "checkpoint.pt", loss=noting(note, loss), evaluate=careless)
    assert [module.training for module in model.modules()] == modes
    assert seen == {(2, True, not training), (0, False, False)}


def test_only_training_is_compiled_and_a_plain_run_resumes_it(tmp_path, monkeypatch):
    """The plain model is evaluated and saved. This stand-in for torch.compile only wraps."""
    seen, model, path = set(), small_model(), tmp_path / "checkpoint.pt"
    note = lambda model, *args: seen.add((type(model), len(args)))  # noqa: E731
    monkeypatch.setattr(torch, "compile", nn.Sequential)
    options = {"loss": noting(note, loss), "evaluate": noting(note, evaluate)}
    train_small(model, path, compile=True, **options)
    assert seen == {(nn.Sequential, 2), (type(model), 0)}
    train_small(model, path, resume=True)
