"""relatives.py: each attention equals its paper's sum over keys, in float64; the released
code's rotary positions, (17); and your own file, as in the README, in a script and in a study."""

import hashlib
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import assert_mistake, flags_of, run_here
from torch.testing import assert_close

import train_shakespeare
from nala_min import ATTENTIONS, key_features, query_features, runcard, train
from nala_min.model import Config, nala_attention
from nala_min.relatives import register, rotary_attention, rotate

B, H, N, D = 2, 3, 7, 4
PARAMETERS = {"polar": "exponent", "delta": "share"}  # the others have none
both = pytest.mark.parametrize("causal", [True, False])


def attention(name):
    """The attention called name, in float64. If it has a parameter, the values are random."""
    attend = ATTENTIONS[name]
    if isinstance(attend, type):
        attend = attend(Config(num_heads=H, dim=H * D)).double()
        parameter = getattr(attend, PARAMETERS[name])
        parameter.data = torch.randn_like(parameter)
    return attend


def qkv(num_tokens=N):
    return torch.randn(3, B, H, num_tokens, D, dtype=torch.float64)


# --- The relatives, as sums over all pairs --------------------------------------------------------


def norm(x):
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def focused(x):
    return F.relu(x) ** 3 * (norm(F.relu(x)) / norm(F.relu(x) ** 3).clamp_min(1e-300))


def hedgehog(x):
    exps = torch.cat([x, -x], dim=-1).exp()
    return exps / exps.sum(-1, keepdim=True)


SCORES = {
    "focused": lambda q, k: focused(q) @ focused(k).mT,
    "clipped": lambda q, k: (
        F.relu(q / norm(q)) ** (3 * (0.5 + norm(q).tanh())) @ (F.relu(k) ** 3).mT
    ),
    "hedgehog": lambda q, k: hedgehog(q) @ hedgehog(k).mT,
    "magnitude-aware": lambda q, k: (F.elu(q) + 1) @ (F.elu(k) + 1).mT / math.sqrt(D),
    "injective": lambda q, k: q @ k.mT / math.sqrt(D),
}
NAMES = [*SCORES, *PARAMETERS]


def weights(scores, causal, name=""):
    """Weights (B, H, N, N) of the keys. By default, the scores divided by their sum."""
    visible = torch.ones(N, N).tril() if causal else torch.ones(N, N)
    scores, n = scores * visible, visible.sum(-1, keepdim=True)
    total = scores.sum(-1, keepdim=True)
    if name == "magnitude-aware":  # beta a - gamma
        return ((1 + n / total) * scores / n - total / n**2) * visible
    if name == "injective":  # centred scores plus an equal share
        return (scores - total / n + 1) / n * visible
    return scores / total.masked_fill(total == 0, 1.0)


@both
@pytest.mark.parametrize("name", SCORES)
def test_a_relative_weights_keys_as_in_its_paper(name, causal):
    q, k, v = qkv()
    options = {"causal": True} if causal else {}
    want = weights(SCORES[name](q, k), causal, name) @ v
    assert_close(attention(name)(q, k, v, **options), want)


@both
def test_polar_has_half_the_channels_for_equal_and_half_for_opposite_signs(causal):
    polar, (q, k, v) = attention("polar"), qkv()
    power = 1 + 3 * torch.sigmoid(polar.exponent.detach())[:, :, None]  # (H, 1, 1, D)
    pairs = q[:, :, :, None] * k[:, :, None]  # (B, H, N, N, D)
    same, opposite = (
        weights((pairs.abs() ** power * (sign * pairs > 0)).sum(-1), causal) @ v for sign in (1, -1)
    )
    want = torch.cat([same[..., : D // 2], opposite[..., D // 2 :]], dim=-1)
    assert_close(polar(q, k, v, causal=causal), want)


@both
def test_delta_corrects_its_state_at_each_key(causal):
    delta, tensors = attention("delta"), qkv()
    share, state, states = torch.sigmoid(delta.share.detach()), torch.zeros(B, H, D, D).double(), []
    q, k = (F.normalize(F.silu(x), dim=-1) for x in tensors[:2])
    for t in range(N):
        error = tensors[2][:, :, t] - torch.einsum("bhd,bhdm->bhm", k[:, :, t], state)
        state = state + torch.einsum("h,bhd,bhm->bhdm", share, k[:, :, t], error)
        states.append(state)
    states = states if causal else states[-1:] * N
    want = torch.einsum("bhnd,nbhdm->bhnm", q, torch.stack(states))
    assert_close(delta(*tensors, causal=causal), want)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_may_be_cut_anywhere(name):
    """It continues from its state, which holds no other memory. With zero queries and keys."""
    attend, tensors, pieces, state, start = attention(name), qkv(20).unbind(), [], None, 0
    tensors[0][:, :, 2], tensors[1][:, :, 3], tensors[0][:, :, 4, 0] = 0, 0, 0
    tensors = [x.clone().requires_grad_() for x in tensors]
    want = attend(*tensors, causal=True)
    assert all(x.isfinite().all() for x in torch.autograd.grad(want.square().sum(), tensors))
    for size in (1, 5, 1, 1, 12):
        piece = (x[:, :, start : start + size] for x in tensors)
        out, state = attend(*piece, causal=True, state=state, return_state=True)
        pieces.append(out)
        start += size
        for x in state if isinstance(state, tuple) else [state]:
            if torch.is_tensor(x):
                assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
    assert_close(torch.cat(pieces, dim=2), want)
    assert attend(*tensors, causal=False, return_state=True)[0].shape == want.shape


@both
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_rounded_only_at_the_end(name, causal):
    attend, tensors = attention(name), [x.bfloat16() for x in qkv()]
    want = attend(*(x.double() for x in tensors), causal=causal)
    attend = attend.float() if isinstance(attend, torch.nn.Module) else attend
    assert_close(attend(*tensors, causal=causal), want.bfloat16(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("name", "shape"), [("polar", (2, 1, 4)), ("delta", (2,))])
def test_parameters_begin_at_0_one_per_channel_or_head(name, shape):
    """test_4_models.py trains them."""
    parameter = getattr(ATTENTIONS[name](Config(num_heads=2, dim=8)), PARAMETERS[name])
    assert parameter.shape == shape and (parameter == 0).all()


# --- Rotary positions, as in the released code ----------------------------------------------------

RELEASED = np.load(Path(__file__).parent / "released_rotary.npz")


@pytest.mark.parametrize("case", sorted({name.rpartition("/")[0] for name in RELEASED.files}))
def test_released_rotary(case):
    """(17) for images: outputs equal those of the released code with eps = 0."""
    names = ("q", "k", "v", "grid", "exact")
    q, k, v, grid, exact = (torch.from_numpy(RELEASED[f"{case}/{x}"]) for x in names)
    positions = torch.cartesian_prod(*(torch.arange(int(size)) for size in grid))
    assert_close(rotary_attention(q, k, v, positions), exact, rtol=1e-9, atol=1e-9)


def turned(features):
    """Channels 2j and 2j + 1 of each half, turned by position times frequency: D = 4 has two."""
    angles = torch.arange(N)[:, None] * torch.tensor([1.0, 1e-4] * 2, dtype=torch.float64)
    pairs = torch.view_as_complex(features.unflatten(-1, (-1, 2)).contiguous())
    turns = torch.polar(torch.ones_like(angles), angles)[:, : pairs.shape[-1]]
    return torch.view_as_real(pairs * turns).flatten(-2)


@pytest.mark.parametrize("feature_map", ["cosine", "split", "elu"])
def test_rotary_turns_only_the_numerator(feature_map):
    """(17) for text, against a sum over pairs. The first query is zero: only elu gives it mass."""
    q, k, v = qkv()
    q[:, :, 0] = 0
    phi_q, phi_k = query_features(q, feature_map), key_features(k, feature_map)
    mass = (phi_q @ phi_k.mT).sum(-1, keepdim=True)
    want = turned(phi_q) @ turned(phi_k).mT @ v / mass.masked_fill(mass == 0, math.inf)
    got = rotary_attention(q, k, v, torch.arange(N)[:, None], feature_map)
    assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert rotate(torch.randn(3, 4), torch.rand(3, 2).double()).dtype == torch.float32


# --- Your own file --------------------------------------------------------------------------------

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python title=mine.py\n(.+?)```", README, re.DOTALL)
ATTENTION = """from nala_min.model import nala_attention
def attention(q, k, v, *, causal, state=None, return_state=False):
    out, after = nala_attention(q, k, v, causal=causal, state=state, return_state=True)
    return (2 * out, after) if return_state else 2 * out"""
RESULT = "(2 * out, after)"
FEATURES = "def query_features(q): return q.exp()\ndef key_features(k): return k.exp()"
HIDDEN = "layers = [torch.nn.Linear(4, 8)]\ndef query_features(q): return layers[0](q).exp()\n"
CLASS = "import torch\nclass attention(torch.nn.Module):\n"
BROKEN = {  # content of a file: a part of the message
    "import torch\n" + HIDDEN + "key_features = query_features": "parameters must be in",
    CLASS + "    pass": "TypeError: ",
    CLASS.replace("torch.nn.Module", "object") + "    pass": "attention must be a function or",
    CLASS + "    def __init__(self, config): super().__init__()\n"
    "    def forward(self, q, k, v, **options): return v.cumsum(2).flip(2), None": "the future",
    "x = 1": "neither",
    "def query_features(q): return q": "got query_features",
    FEATURES + "\n" + ATTENTION: "got query_features, key_features, attention",
    "def f(:": "SyntaxError: ",
    "raise SystemExit": "SystemExit: ",
    FEATURES.replace("q.exp()", "q"): "query_features must be finite and non-negative",
    FEATURES.replace("q.exp()", "q.sum(-1)"): "query_features's result",
    FEATURES.replace("q.exp()", "q.exp()[..., 1:]"): "RuntimeError: ",
    FEATURES.replace("k.exp()", "(k / k.norm(dim=-1, keepdim=True)).exp()"): "key_features must",
    FEATURES.replace("k.exp()", "(k + 0.001 * k.mean(2, keepdim=True)).exp()"): "token by itself",
    ATTENTION.replace(RESULT, "2 * out"): "return_state=True",
    ATTENTION.replace(RESULT, "(out[..., :1], after)"): "output must be (2, 3, 6, 4)",
    ATTENTION.replace(RESULT, "(out / 0, after)"): "output must be finite",
    ATTENTION.replace(RESULT, "(out + 0.001 * v.mean(2, keepdim=True), after)"): "the future",
    ATTENTION.replace(RESULT, "(out, 0.99 * after)"): "continue from its state",
    ATTENTION.replace(RESULT, "(out + v.mean(0), after)"): "other examples of a batch",
    ATTENTION.replace(RESULT, "(out, v.mul_(2)[:, :, :1])"): "without writing to",
    FEATURES.replace("k.exp()", "k.roll(1, 2).exp()"): "token by itself",
}
TEXT = "".join(f"Line {i}: the quick brown fox jumps over 5 dogs.\n" for i in range(44))
SIZES = {"layers": 1, "heads": 2, "dim": 16, "batch": 2, "steps": 4}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory: a file of your own, the README's, and a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(EXAMPLE, encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    yield tmp_path
    ATTENTIONS.pop("mine.py", None)


@both
def test_a_file_is_registered_under_its_name(folder, causal):
    """With its SHA-256. Random numbers are left alone, and an edited file replaces the old one."""
    path, tensors, numbers = Path("mine.py"), qkv(), torch.get_rng_state()
    more = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    register(path, D, causal=causal)
    out = ATTENTIONS["mine.py"](*tensors, causal=causal)
    assert_close(out, attention("hedgehog")(*tensors, causal=causal))  # the README's features
    for factor in (2, 3):
        path.write_text(ATTENTION.replace("2 * out", f"{factor} * out"), encoding="utf-8")
        digest = register(path, D, causal=causal)
        out = ATTENTIONS["mine.py"](*tensors, causal=causal)
        assert_close(out, factor * nala_attention(*tensors, causal=causal))
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.equal(torch.get_rng_state(), numbers)
    assert more == (random.getstate(), str(np.random.get_state()))  # noqa: NPY002


@pytest.mark.parametrize("source", BROKEN)
def test_an_invalid_file_is_rejected_in_one_line(folder, source):
    (folder / "mine.py").write_text(source, encoding="utf-8")
    path = [*sys.path]
    with pytest.raises(ValueError) as error:
        register("mine.py", D, causal=True)
    assert sys.path == path
    message = str(error.value)
    assert message.startswith("mine.py") and "\n" not in message and BROKEN[source] in message
    assert "mine.py" not in ATTENTIONS
    if "the future" in message:  # which images do not have
        register("mine.py", D, causal=False)


def run_text(folder, *flags):
    sizes = flags_of(SIZES | {"block": 8})
    return run_here(train_shakespeare, folder, *sizes, "--data", "text.txt", "--out", "run", *flags)


def test_a_text_model_trains_with_it_and_samples_until_the_file_changes(folder):
    mine, sample = ("--attention", "mine.py"), ("--sample", "30", "--prompt", "Line")
    assert run_text(folder, *mine).returncode == 0
    card = runcard.read_json(folder / "run" / "card.json")
    digest = hashlib.sha256((folder / "mine.py").read_bytes()).hexdigest()
    assert [*card["config"]["attention_sha256"].values()] == [digest]
    (stats,) = card["results"]["attention_stats"]
    assert stats["attention"] == "mine.py" and stats["entropy"]
    sampled = run_text(folder, *mine, *sample)
    assert sampled.stdout.startswith("Line") and len(sampled.stdout) == 4 + 30 + 1
    assert run_text(folder, *sample).stdout == sampled.stdout
    assert run_text(folder, *mine, "--resume").returncode == 0
    assert "changed" not in sampled.stderr
    with pytest.MonkeyPatch.context() as patch:  # an edited method
        patch.setattr(train, "code_sha256", lambda: "other")
        assert "nala_min's code has changed" in run_text(folder, *sample).stderr
        edited = run_text(folder, *mine, "--resume")
    assert_mistake(edited, train_shakespeare, "code = nala_min, since changed")

    (folder / "mine.py").write_text(EXAMPLE + "# another", encoding="utf-8")
    assert_mistake(run_text(folder, *sample), train_shakespeare, "mine.py has changed")
    assert_mistake(run_text(folder, *mine, "--resume"), train_shakespeare, "since changed")
    (folder / "mine.py").unlink()
    assert_mistake(run_text(folder, *sample), train_shakespeare, "No such file")


def test_a_neighbour_is_imported_and_is_a_part_of_the_file(folder):
    """Also from another folder; its random numbers are the same in each process."""
    (folder / "sub").mkdir()
    helper = folder / "sub" / "helper.py"
    drawn = "torch.randn(4, 9) + random.random() + numpy.random.rand()"
    helper.write_text(f"import numpy, random, torch\nP = {drawn}", encoding="utf-8")
    source = "import sys\nfrom helper import P\ndef query_features(q): return (q @ P.to(q)).exp()\n"
    (folder / "sub" / "own.py").write_text(source + "key_features = query_features", "utf-8")
    digest, tensors = register("sub/own.py", D, causal=True), qkv()
    assert sys.modules["sys"] is sys
    first = ATTENTIONS["sub/own.py"](*tensors)
    assert register("sub/own.py", D, causal=True) == digest
    assert_close(ATTENTIONS["sub/own.py"](*tensors), first)
    helper.write_text("import torch\nP = torch.zeros(4, 9) + 0.1", encoding="utf-8")
    assert register("sub/own.py", D, causal=True) != digest
    assert not torch.equal(ATTENTIONS.pop("sub/own.py")(*tensors), first)
