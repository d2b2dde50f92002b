"""relatives.py: each attention equals its paper's sum over keys, in float64; rotary positions (17);
and your own file, as in the README, in a script and in a study."""

import hashlib
import math
import random
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import assert_mistake, flags_of, run_here
from torch.testing import assert_close

import train_cifar
import train_shakespeare
from nala_min import ATTENTIONS, key_features, query_features, relatives, runcard, train
from nala_min.model import Config, nala_attention
from nala_min.relatives import register, rotary_attention

B, H, N, D = 2, 3, 7, 4
DELTAS = "delta", "nala-delta", "gated-delta", "nala-gated-delta"
both = pytest.mark.parametrize("causal", [True, False])


def attention(name, dtype=torch.float64):
    """The attention called name, with random parameters. The input that it may take is q."""
    attend = ATTENTIONS[name]
    if not isinstance(attend, type):
        return attend
    attend = attend(Config(num_heads=H, dim=H * D))
    for parameter in attend.parameters():
        parameter.data.normal_()
    attend = attend.to(dtype)
    if name not in DELTAS:
        return attend
    return lambda q, k, v, **options: attend(q, k, v, x=q.transpose(1, 2).flatten(2), **options)


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
NAMES = [*SCORES, "polar", *DELTAS]


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


def delta_loop(q, k, v, share, log_decay, state):
    """The delta rule as it is defined, a token at a time."""
    outputs = []
    for t in range(q.shape[2]):
        k_t, kept = k[:, :, t, :, None], log_decay[:, :, t, None, None].exp() * state
        state = kept + k_t @ (share[:, :, t, None, None] * (v[:, :, t, None] - k_t.mT @ kept))
        outputs.append(q[:, :, t, None] @ state)
    return torch.cat(outputs, dim=2), state


@pytest.mark.parametrize(("num_tokens", "chunk_size"), [(1, 32), (31, 32), (70, 32), (20, 7)])
def test_chunks_give_the_delta_rule_with_gradients(num_tokens, chunk_size):
    """Outputs and last state, from a first state. Even a decay that underflows is finite."""
    (q, k, v), results = qkv(num_tokens), []
    share, log_decay = torch.rand(2, B, H, num_tokens, dtype=torch.float64)
    log_decay = torch.where(share < 0.1, -800.0, -log_decay)
    tensors = q, F.normalize(k, dim=-1), v, share, log_decay, torch.randn(B, H, D, D).double()
    tensors = [x.clone().requires_grad_() for x in tensors]
    for rule in (partial(relatives.delta_rule, chunk_size=chunk_size), delta_loop):
        out, state = rule(*tensors)
        loss = out.cos().sum() + state.sin().sum()
        results.append([out, state, *torch.autograd.grad(loss, tensors)])
    assert_close(*results, rtol=1e-9, atol=1e-9)


@both
@pytest.mark.parametrize("name", DELTAS)
def test_delta_attentions_have_features_of_length_1_and_shares_of_the_token(name, causal):
    """The published models' SiLU, or NaLa's features (7) to (9) in its place."""
    attend = ATTENTIONS[name](Config(num_heads=H, dim=H * D)).double()
    (q, k, v), x = qkv(), torch.randn(B, N, H * D, dtype=torch.float64)
    assert torch.equal(attend.share, torch.zeros(H, H * D))  # so all shares begin at 1/2
    if "gated" in name:  # and the decays of three heads at exp(-rate dt)
        dt, rates = F.softplus(attend.bias) + attend.dt.sum(dim=1), attend.log_rate.exp()
        want = [[0.00215443, 0.01, 0.0464159], [16 / 6, 16 / 2, 16 * 5 / 6]]
        assert_close(torch.stack([dt, rates]), torch.tensor(want).double(), rtol=1e-5, atol=0)
    for parameter in attend.parameters():
        parameter.data.normal_()
    phi = (query_features, key_features) if "nala" in name else (F.silu, F.silu)
    phi_q, phi_k = (F.normalize(f(y), dim=-1) for f, y in zip(phi, (q, k), strict=True))
    share = torch.sigmoid(x @ attend.share.T).mT
    log_decay = torch.zeros_like(share)
    if "gated" in name:
        log_decay = -attend.log_rate.exp()[:, None] * F.softplus(x @ attend.dt.T + attend.bias).mT
    state = torch.zeros(B, H, phi_k.shape[-1], D, dtype=torch.float64)
    want, state = delta_loop(phi_q, phi_k, v, share, log_decay, state)
    want = want if causal else phi_q @ state
    assert_close(attend(q, k, v, x=x, causal=causal), want)


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
    tensors, outs = [x.bfloat16() for x in qkv()], []
    for inputs, dtype in ((tensors, torch.float32), ([x.double() for x in tensors], torch.float64)):
        torch.manual_seed(0)  # the same parameters
        outs.append(attention(name, dtype)(*inputs, causal=causal).bfloat16())
    assert_close(*outs, rtol=0.02, atol=0.02)


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


def test_one_block_of_an_image_model_may_use_it(folder):
    settings = train_cifar.Settings(preset="cpu", attention="nala,mine.py", layers=2)
    assert settings.out.name == "cifar_cpu_nala-mine_seed1_layers2"
    first, second = train_cifar.build_model(settings.config() | {"classes": range(10)}).blocks
    assert first.attention.attend is ATTENTIONS["nala"]
    assert second.attention.attend is ATTENTIONS["mine.py"]


def test_a_neighbour_is_imported_and_is_a_part_of_the_file(folder):
    """Also from another folder; its random numbers are the same in each process."""
    (folder / "sub").mkdir()
    helper = folder / "sub" / "helper.py"
    drawn = "torch.randn(4, 9) + random.random() + numpy.random.rand()"
    helper.write_text(f"import numpy, random, sys, torch\nP = {drawn}", encoding="utf-8")
    source = "from helper import P\ndef query_features(q): return (q @ P.to(q)).relu()\n"
    (folder / "sub" / "own.py").write_text(source + "key_features = query_features", "utf-8")
    digest, tensors = register("sub/own.py", D, causal=True), qkv()
    assert sys.modules["sys"] is sys
    first = ATTENTIONS["sub/own.py"](*tensors)
    assert register("sub/own.py", D, causal=True) == digest
    assert_close(ATTENTIONS["sub/own.py"](*tensors), first)
    helper.write_text("import torch\nP = torch.zeros(4, 9) + 0.1", encoding="utf-8")
    assert register("sub/own.py", D, causal=True) != digest
    assert not torch.equal(ATTENTIONS.pop("sub/own.py")(*tensors), first)
