"""The bug zoo: bugs that published linear attentions shipped, and some that are likely with images,
each in a copy of model.py. The test named with a bug must fail, or that test proves nothing."""

import pytest
import test_model
import torch
from mutants import SOURCE, load_model, mutant

from nala_min import fast

# name: (old code, new code, test, its arguments). Comments name the project and issue of real bugs.
ZOO = {
    # flash-linear-attention #1263
    "padding keys stay in the normaliser": (
        "phi_k = phi_k.masked_fill(masked, 0.0)",
        "v = v.masked_fill(masked, 0.0)",
        test_model.test_padding_changes_nothing,
        {"mode": "parallel", "garbage": 100.0},
    ),
    # PyTorch #101967: 0 * NaN = NaN
    "a masked NaN reaches everyone": (
        "k, v = k.masked_fill(masked, 0.0), v.masked_fill(masked, 0.0)",
        "k = k.masked_fill(masked, 0.0)",
        test_model.test_padding_changes_nothing,
        {"mode": "chunked", "garbage": float("nan")},
    ),
    # flash-linear-attention #594, #850
    "normaliser summed over heads": (
        "numerator, normaliser = sums.split([v.shape[3], 1], dim=-1)",
        "numerator, normaliser = sums[..., :-1], sums[..., -1:].sum(1, keepdim=True)",
        test_model.test_heads_and_batches_do_not_mix,
        {"mode": "chunked"},
    ),
    # performer-pytorch #40
    "multiplied by the denominator": (
        "out = numerator / normaliser.masked_fill(normaliser == 0, math.inf)",
        "out = numerator * normaliser",
        test_model.test_published_forms,
        {"case": "cosine/unit"},
    ),
    # flash-linear-attention #267
    "decoding forgets the earlier keys' normaliser": (
        "if state is None else state  # no token read yet",
        "if state is None else F.pad(state[..., :-1], (0, 1))",
        test_model.test_causal_forms_equal_the_loop,
        {"feature_map": "elu", "form": "cut and resumed", "num_tokens": 7},
    ),
    # flash-linear-attention #875
    "no gradient through the denominator": (
        "out = numerator / normaliser.masked_fill",
        "out = numerator / normaliser.detach().masked_fill",
        test_model.test_gradcheck,
        {"feature_map": "cosine", "mode": "chunked"},
    ),
    # lightning-attention #28
    "the rows after the last whole chunk are lost": (
        "if padding := num_chunks * chunk_size - num_tokens:",
        "phi_q = phi_q.clone()\n"
        "    phi_q[:, :, num_tokens // chunk_size * chunk_size :] = 0\n"
        "    if padding := num_chunks * chunk_size - num_tokens:",
        test_model.test_causal_forms_equal_the_loop,
        {"feature_map": "cosine", "form": "chunked by 64", "num_tokens": 65},
    ),
    # linear-attention-transformer, bucket size above 1
    "a chunk does not see its own tokens": (
        "return (phi_q @ phi_k.mT).tril() @ values",
        "return (phi_q @ phi_k.mT).tril(-1) @ values",
        test_model.test_causal_forms_equal_the_loop,
        {"feature_map": "cosine", "form": "chunked by 16", "num_tokens": 63},
    ),
    "a chunk sees its own future": (
        "return (phi_q @ phi_k.mT).tril() @ values",
        "return (phi_q @ phi_k.mT) @ values",
        test_model.test_the_future_changes_no_past_output,
        {"mode": "chunked", "size": 1.0},
    ),
    "a chunk sees the state after itself": (
        "sums = q @ torch.stack(states, dim=2)",
        "sums = q @ torch.stack([*states[1:], state], dim=2)",
        test_model.test_the_future_changes_no_past_output,
        {"mode": "chunked", "size": 1.0},
    ),
    # performer-pytorch: stabiliser over the whole sequence
    "keys scaled by the largest of the whole sequence": (
        "phi_k = key_map(at_least_float32(k))  # (B, H, K, F)",
        "phi_k = key_map(at_least_float32(k))\n"
        "        phi_k = phi_k / phi_k.amax((2, 3), keepdim=True)",
        test_model.test_the_future_changes_no_past_output,
        {"mode": "chunked", "size": 1e9},
    ),
    # the published forms of NaLaFormer
    "a zero query gives NaN": (
        "x / norm.masked_fill(norm == 0, 1.0)",
        "x / norm",
        test_model.test_degenerate_inputs_stay_finite,
        {"damage": "zero query row"},
    ),
    "an exact-zero channel has a NaN gradient": (
        "torch.exp2(power * torch.log2(ratio.clamp_min(tiny)))",
        "torch.exp2(power * torch.log2(ratio))",
        test_model.test_degenerate_inputs_stay_finite,
        {"damage": "exact-zero channels"},
    ),
    # Stan math #3031
    "the root of a zero has an infinite slope": (
        "return torch.where(k == 0, 0.0, size.pow(lam))",
        "return k.abs().pow(lam)",
        test_model.test_degenerate_inputs_stay_finite,
        {"damage": "exact-zero channels"},
    ),
    "zero mass gives NaN": (
        "normaliser.masked_fill(normaliser == 0, math.inf)",
        "normaliser",
        test_model.test_no_mass_gives_output_and_gradient_zero,
        {"mode": "quadratic", "cause": "keys"},
    ),
    "an eps swallows small keys": (
        "normaliser.masked_fill(normaliser == 0, math.inf)",
        "(normaliser + 1e-6)",
        test_model.test_rows_sum_to_one,
        {"feature_map": "cosine", "mode": "parallel"},
    ),
    # flash-linear-attention #1261
    "elu + 1 is rounded to 0": (
        "F.relu(x) + x.masked_fill(x > 0, 0.0).exp()",
        "F.elu(x) + 1",
        test_model.test_baselines_are_elu_plus_one_and_relu,
        {},
    ),
    # fast-transformers #32, Sana #267
    "half precision is not summed in float32": (
        "return x.to(torch.promote_types(x.dtype, torch.float32))",
        "return x",
        test_model.test_half_precision_sums_over_many_tokens,
        {"mode": "chunked", "dtype": torch.float16},
    ),
    "autocast lowers the sums": (
        'with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):',
        "if True:",
        test_model.test_autocast_changes_nothing,
        {"mode": "chunked"},
    ),
    # PyTorch #40157
    "a state holds the whole sequence": (
        "x[:, x.shape[1] - num_past :].clone()",
        "x[:, x.shape[1] - num_past :]",
        test_model.test_a_state_holds_no_more_memory_than_its_own,
        {},
    ),
    # linear-attention-transformer and others: 2 GiB at B 4, H 8, N 2048 in float32
    "a state for every token": (
        "num_chunks = 1 if torch",
        "chunk_size = 1\n    num_chunks = 1 if torch",
        test_model.test_chunked_form_keeps_no_state_per_token,
        {"mode": "chunked"},
    ),
    # two third-party ports of NaLaFormer
    "the power acts on the norm, which cancels": (
        "torch.exp2(power * torch.log2(ratio.clamp_min(tiny)))",
        "ratio * (1 + power)",
        test_model.test_query_norm_acts_as_an_exponent,
        {"feature_map": "cosine"},
    ),
    "a LayerNorm on q erases its norm": (
        "norm, direction = decompose(q)",
        "norm, direction = decompose(F.layer_norm(q, q.shape[-1:]))",
        test_model.test_query_norm_acts_as_an_exponent,
        {"feature_map": "split"},
    ),
    # the cosine map without its factor pi/4: cos(2) < 0
    "angles span more than a quarter turn": (
        "return torch.cat([magnitude * cos, magnitude * sin], dim=-1)",
        "theta = torch.tanh(alpha * direction)\n"
        "    return torch.cat([magnitude * theta.cos(), magnitude * theta.sin()], dim=-1)",
        test_model.test_weights_are_not_negative,
        {"feature_map": "cosine", "dtype": torch.float64},
    ),
    # the published cosine map: its two features cancel
    "angles about zero round to negative weights": (
        "return torch.cat([magnitude * cos, magnitude * sin], dim=-1)",
        "theta = math.pi / 4 * torch.tanh(alpha * direction)\n"
        "    return torch.cat([magnitude * theta.cos(), magnitude * theta.sin()], dim=-1)",
        test_model.test_weights_are_not_negative,
        {"feature_map": "cosine", "dtype": torch.float32},
    ),
    # not from other projects: likely bugs with images
    "a patch sees only those before it": (
        "causal=self.causal, state=state[0]",
        "causal=True, state=state[0]",
        test_model.test_gated_block_on_a_grid_by_hand,
        {"attention": "nala"},
    ),
    "patches are taken column by column": (
        "x.flatten(1, -2).unflatten(",
        "x.transpose(1, -2).flatten(1, -2).unflatten(",
        test_model.test_gated_block_on_a_grid_by_hand,
        {"attention": "nala"},
    ),
    "attentions are assigned in reverse order": (
        "else tuple(self.attention)",
        "else tuple(self.attention)[::-1]",
        test_model.test_each_block_has_the_configured_attention,
        {"names": ("nala", "softmax")},
    ),
    "the images of a batch share their attention": (
        "o = o.transpose(1, 2).reshape(x.shape)",
        "o = o.mean(0, keepdim=True).expand_as(o).transpose(1, 2).reshape(x.shape)",
        test_model.test_gated_block_on_a_grid_by_hand,
        {"attention": "nala"},
    ),
    "an image is mirrored at its edges": (
        "padding=padding, groups=dim)",
        'padding=padding, groups=dim, padding_mode="zeros" if causal else "reflect")',
        test_model.test_gated_block_on_a_grid_by_hand,
        {"attention": "nala"},
    ),
}


@pytest.mark.parametrize("name", ZOO)
def test_a_published_bug_is_rejected(name):
    old, new, test, arguments = ZOO[name]
    broken = mutant(old, new)
    with pytest.raises(AssertionError):
        test(broken, **arguments)


def test_a_copy_without_a_bug_is_accepted():
    """The copies are rejected for their bugs, not for being copies."""
    copy = load_model(SOURCE)
    for _, _, test, arguments in ZOO.values():
        torch.manual_seed(0)
        test(copy, **arguments)


def test_a_silently_wrong_gradient_is_rejected(monkeypatch):
    """Our own bug: fast.py took all features for the paper's. After an edit to model.py, outputs
    were right, but gradients were silently wrong. Now it knows the features by their code."""
    broken = mutant("(tau + torch.tanh(norm))", "(tau + norm / (1 + norm))")
    arguments = {"feature_map": "cosine", "mode": "auto"}
    test_model.test_gradcheck(broken, **arguments)
    monkeypatch.setattr(fast, "is_known", lambda *_: True)
    with pytest.raises(AssertionError):
        test_model.test_gradcheck(broken, **arguments)
