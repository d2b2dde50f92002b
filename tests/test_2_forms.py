"""All forms give the same numbers and gradients: with masks, states, any chunk size, and keys of
another number than queries. And each form costs what it promises."""

import itertools
from functools import partial

import pytest
import torch
from test_1_equations import B, paper_attention, random_qkv
from torch.testing import assert_close

from nala_min import model

MODES = {
    "parallel": {"mode": "parallel"},
    "auto": {},
    "quadratic": {"causal": True, "mode": "quadratic"},
    "chunked": {"causal": True, "mode": "chunked", "chunk_size": 4},
    "recurrent": {"causal": True, "mode": "recurrent"},
    "causal auto": {"causal": True, "chunk_size": 4},
}


def output_and_gradients(attention, q, k, v, tokens=slice(None)):
    """The output of attention(q, k, v), and the gradients of a fixed random weighted sum of it."""
    out = attention(q, k, v)[:, :, tokens]
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return out, *torch.autograd.grad((out * cotangent).sum(), (q, k, v))


def padding(num_keys):
    """A mask for two texts: one without padding, one with much."""
    return torch.rand(B, num_keys) < torch.tensor([[1.0], [0.6]])


@pytest.mark.parametrize("mode", ["auto", "parallel"])
@pytest.mark.parametrize(
    ("feature_map", "num_tokens", "num_keys"),
    [("cosine", 65, 20), ("split", 7, 7), ("elu", 3, 130), ("relu", 1, 4)],
)
def test_bidirectional_form_equals_the_loop(feature_map, mode, num_tokens, num_keys):
    """(5), (13): the loop runs over queries. The first three keys may come from a state."""
    (q, k, v), mask = random_qkv(num_tokens, num_keys), padding(num_keys)
    whole = partial(model.nala_attention, feature_map=feature_map, mode=mode)

    def in_two_parts(q, k, v, key_mask):
        options = {"key_mask": key_mask[:, :3], "return_state": True}
        _, state = whole(q, k[:, :, :3], v[:, :, :3], **options)
        return whole(q, k[:, :, 3:], v[:, :, 3:], state=state, key_mask=key_mask[:, 3:])

    loop = partial(paper_attention, feature_map=feature_map, key_mask=mask)
    want = output_and_gradients(loop, q, k, v)
    for attention in (whole, in_two_parts):
        got = output_and_gradients(partial(attention, key_mask=mask), q, k, v)
        assert_close(got, want, rtol=1e-10, atol=1e-10)


def cut_and_resume(q, k, v, key_mask, feature_map):
    """Attention to three tokens at a time, by each form that has a state in turn."""
    modes, outs, state = itertools.cycle(("chunked", "recurrent", "auto")), [], None
    pieces = *(x.split(3, dim=2) for x in (q, k, v)), key_mask.split(3, dim=1), modes
    options = {"causal": True, "chunk_size": 2, "feature_map": feature_map, "return_state": True}
    for *qkv, mask, mode in zip(*pieces, strict=False):
        options |= {"key_mask": mask, "mode": mode, "state": state}
        out, state = model.nala_attention(*qkv, **options)
        outs.append(out)
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize(
    ("feature_map", "form", "num_tokens"),
    [
        ("cosine", "quadratic", 9),
        ("elu", "recurrent", 7),
        ("split", "chunked by 100", 7),
        ("cosine", "chunked by 16", 63),
        ("relu", "chunked by 64", 130),
        ("cosine", "auto", 130),
        ("split", "auto by 7", 63),
        ("elu", "auto", 20),
        ("cosine", "cut and resumed", 65),
        ("elu", "cut and resumed", 7),
    ],
)
def test_causal_forms_equal_the_loop(feature_map, form, num_tokens):
    """(13c), (14), (15): outputs and gradients equal those of (5), token by token."""
    mode, _, size = form.partition(" by ")
    attention = partial(cut_and_resume, feature_map=feature_map)
    if form != "cut and resumed":
        options = {"mode": mode, "chunk_size": int(size) if size else None}
        attention = partial(model.nala_attention, causal=True, feature_map=feature_map, **options)
    (q, k, v), mask = random_qkv(num_tokens), padding(num_tokens)
    loop = partial(paper_attention, causal=True, feature_map=feature_map, key_mask=mask)
    got = output_and_gradients(partial(attention, key_mask=mask), q, k, v)
    assert_close(got, output_and_gradients(loop, q, k, v), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "quadratic"])
def test_state_is_the_sum_over_tokens(mode):
    """(14): S = sum phi(k)^T v, z = sum phi(k)."""
    q, k, v = random_qkv(9)
    _, state = model.nala_attention(q, k, v, return_state=True, **MODES[mode])
    phi_k = model.key_features(k)
    S, z = torch.einsum("bhnf,bhnm->bhfm", phi_k, v), phi_k.sum(2)
    assert_close(state, torch.cat([S, z[..., None]], -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("feature_map", "mode"),
    [("cosine", mode) for mode in MODES]
    + [("split", "auto"), ("elu", "auto"), ("relu", "chunked")],
)
def test_gradcheck(feature_map, mode):
    """Gradients against finite differences."""
    qkv = random_qkv(5, batch=1, heads=1)
    attention = partial(model.nala_attention, feature_map=feature_map, **MODES[mode])
    assert torch.autograd.gradcheck(attention, qkv, fast_mode=True, raise_exception=False)


def test_a_mode_runs_its_own_form(monkeypatch):
    """Results cannot show this: all forms give the same, at different costs. "auto" asks fast.py
    first. If it declines, one token is a step of the recurrent form."""
    calls, q, k, v = [], *random_qkv(3)
    for name in ("parallel", "recurrent", "chunked"):
        form = getattr(model, name)

        def recorded(*x, name=name, form=form):
            calls.append((name, *x[4:]))  # and the size of a chunk
            return form(*x)

        monkeypatch.setattr(model, name, recorded)
    monkeypatch.setattr(model.fast, "attention", lambda *_: ("o", "S"))
    assert model.nala_attention(q, k, v) == "o" and calls == []
    assert model.nala_attention(q, k, v, return_state=True) == ("o", "S")
    monkeypatch.setattr(model.fast, "attention", lambda *_: None)
    for mode, causal in (("auto", False), ("parallel", False), ("parallel", True)):
        model.nala_attention(q, k, v, mode=mode, causal=causal)
    for mode in ("quadratic", "recurrent", "chunked", "auto"):
        model.nala_attention(q, k, v, mode=mode, causal=True)
    model.nala_attention(*(x[:, :, :1] for x in (q, k, v)), causal=True)
    whole, chunks, step = ("chunked", 3), ("chunked", 64), ("recurrent",)
    assert calls == [("parallel",)] * 2 + [whole, whole, step, chunks, chunks, step]


def test_no_form_keeps_a_state_per_token():
    """Not for the gradients either: fast.py, and the readable chunked form."""
    qkv, sizes = [torch.randn(1, 1, 512, 16, requires_grad=True) for _ in range(3)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
        for mode in ("auto", "chunked"):
            model.nala_attention(*qkv, causal=True, mode=mode, chunk_size=64)
    assert max(sizes) < 512 * 32 * 17 / 4
