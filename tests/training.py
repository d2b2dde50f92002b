"""A tiny model and its training, for several test files; and signals that cannot end pytest."""

import functools
import signal

import pytest
import torch
import torch.nn.functional as F

from nala_min import Config, NaLaLM
from nala_min.runcard import code_sha256
from nala_min.train import Recipe, fit

EXTRA = {"attention": "nala", "dim": 16, "text": "märchen.txt"}
RECIPE = Recipe(steps=7, learning_rate=0.01, warmup=2, eval_every=3)
CODE = {"code": {"name": "nala_min", "sha256": code_sha256()}}
SAVED = EXTRA | CODE | {f"recipe.{x}": y for x, y in vars(RECIPE).items() if x != "bfloat16"}
SIGNALS = [getattr(signal, x) for x in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, x)]


def small_model(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return NaLaLM(Config(vocab_size=11, num_layers=1, num_heads=2, dim=16, dropout=dropout))


def batch(step):
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def loss(model, inputs, targets):
    logits, _ = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def noting(note, function):
    """function, which first calls note with its arguments."""
    return lambda *args: (note(*args), function(*args))[1]


def stopping_at(stop, number=signal.SIGINT):
    """A batch function that raises the signal in step stop."""
    return noting(lambda step: step == stop and signal.raise_signal(number), batch)


@torch.no_grad()
def evaluate(model):
    return {"validation_loss": loss(model, *batch(1000)).item()}


def train_small(model, path, recipe=None, **options):
    """fit with the functions above, unless options replace them: points at steps 3, 6 and 7."""
    options = dict(batch=batch, loss=loss, evaluate=evaluate, extra=EXTRA) | options
    return fit(model, recipe or RECIPE, checkpoint=path, **options)


@pytest.fixture(autouse=True)
def signals_stay_inside(request, monkeypatch):
    """A signal that escapes from the tested code fails its test, and does not end pytest."""
    test = request.node.obj

    @functools.wraps(test)
    def guarded(**arguments):
        try:
            test(**arguments)
        except KeyboardInterrupt as error:
            pytest.fail(f"a KeyboardInterrupt escaped: {error}")

    monkeypatch.setattr(request.node, "obj", guarded)
    before = [signal.signal(number, signal.default_int_handler) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
