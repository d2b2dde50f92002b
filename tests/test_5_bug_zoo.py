"""The bug zoo: bugs that published linear attentions shipped, each in a copy of model.py. The test
named with a bug passes on model.py, and fails on the copy."""

import math
import sys

import pytest
import test_1_equations as equations
import test_2_forms as forms
import test_3_safety as safety
import test_4_models as models
import torch
from mutants import SOURCE, load_model, mutant

FORMS = "quadratic", "chunked by 6", "cut and resumed"
QUADRATIC, CHUNKED, RESUMED = (
    (forms.test_causal_forms_equal_the_loop, "cosine", form, 20) for form in FORMS
)
PADDING, FUTURE = safety.test_padding_changes_nothing, safety.test_the_future_changes_no_past_output
DEGENERATE = safety.test_degenerate_inputs_stay_finite
NO_MASS = safety.test_no_mass_gives_output_and_gradient_zero
NOT_NEGATIVE = equations.test_weights_are_not_negative, "cosine", torch.float32

MASS = "normaliser.masked_fill(normaliser == 0, math.inf)"
POWER = "torch.exp2(power * torch.log2(ratio.clamp_min(tiny)))"
MAP = "return torch.cat([magnitude * cos, magnitude * sin], dim=-1)"
ANGLES = (
    "theta = {}torch.tanh(alpha * direction)\n"
    "    return torch.cat([magnitude * theta.cos(), magnitude * theta.sin()], dim=-1)"
)
SCORES, ALL_SCORES = "(phi_q @ phi_k.mT).tril()", "phi_q @ phi_k.mT"
BUGS = {  # bug: (test, its arguments), old code, new code
    "normaliser summed over heads": (  # flash-linear-attention #594, #850
        QUADRATIC, "normaliser = sums.split([v.shape[3], 1], dim=-1)",
        "normaliser = sums[..., :-1], sums[..., -1:].sum(1, keepdim=True)"),
    # performer-pytorch #40
    "multiplied by the denominator": (QUADRATIC, f"numerator / {MASS}", "numerator * normaliser"),
    "decoding forgets the earlier keys' normaliser": (  # flash-linear-attention #267
        RESUMED, "is None else state  # no token",
        "is None else F.pad(state[..., :-1], (0, 1))  #"),
    "the rows after the last whole chunk are lost": (  # lightning-attention #28
        CHUNKED, "[:, :, :num_tokens], state",
        "[:, :, :num_tokens].index_fill(2, torch.arange(18, num_tokens), 0.0), state"),
    # linear-attention-transformer, bucket size above 1
    "a chunk does not see its own tokens": (QUADRATIC, SCORES, SCORES.replace("()", "(-1)")),
    # two third-party ports of NaLaFormer
    "the power acts on the norm, which cancels": (QUADRATIC, POWER, "ratio * (1 + power)"),
    "a LayerNorm on q erases its norm": (
        QUADRATIC, "= decompose(q)", "= decompose(F.layer_norm(q, q.shape[-1:]))"),
    # flash-linear-attention #875
    "no gradient through the denominator": (
        (forms.test_gradcheck, "cosine", "parallel"), "/ normaliser.", "/ normaliser.detach()."),
    # flash-linear-attention #1263
    "padding keys stay in the normaliser": (
        (PADDING, "parallel", 100.0), "phi_k = phi_k.masked_fill(masked, 0.0)", "pass"),
    # PyTorch #101967: 0 * NaN = NaN
    "a masked NaN reaches everyone": (
        (PADDING, "parallel", math.nan), ", v.masked_fill(masked, 0.0)", ", v"),
    "a chunk sees its own future": ((FUTURE, "chunked", 1.0), SCORES, ALL_SCORES),
    "a chunk sees the state after itself": (
        (FUTURE, "chunked", 1.0), "torch.stack(states, dim=2)",
        "torch.stack([*states[1:], state], dim=2)"),
    # performer-pytorch: stabiliser over the whole sequence
    "keys scaled by the largest of the whole sequence": (
        (FUTURE, "chunked", 1e9), "phi_k = key_map(at_least_float32(k))",
        "phi_k = (y := key_map(at_least_float32(k))) / y.amax((2, 3), keepdim=True)"),
    # the published forms of NaLaFormer
    "a zero query gives NaN": (
        (DEGENERATE, "zero query row"), "x / norm.masked_fill(norm == 0, 1.0)", "x / norm"),
    "an exact-zero channel has a NaN gradient": (
        (DEGENERATE, "exact-zero channels"), POWER, "torch.exp2(power * ratio.log2())"),
    "the root of a zero has an infinite slope": (  # Stan math #3031
        (DEGENERATE, "exact-zero channels"),
        "size.clamp_min(torch.finfo(size.dtype).tiny)", "size"),
    "zero mass gives NaN": ((NO_MASS, "parallel", "keys"), MASS, "normaliser"),
    "an eps swallows small keys": (
        (safety.test_range_of_queries_and_keys, torch.float32), MASS, "(normaliser + 1e-6)"),
    # the cosine map without its factor pi/4: cos(2) < 0
    "angles span more than a quarter turn": (NOT_NEGATIVE, MAP, ANGLES.format("")),
    # the published cosine map: its two features cancel
    "angles about zero round to negative weights": (
        NOT_NEGATIVE, MAP, ANGLES.format("math.pi / 4 * ")),
    "elu + 1 is rounded to 0": (  # flash-linear-attention #1261
        (equations.test_baselines_are_elu_plus_one_and_relu,),
        "F.relu(x) + x.masked_fill(x > 0, 0.0).exp()", "F.elu(x) + 1"),
    "half precision is not summed in float32": (  # fast-transformers #32, Sana #267
        (safety.test_half_precision_sums_over_many_tokens, "parallel", torch.float16),
        "x.to(torch.promote_types(x.dtype, torch.float32))", "x"),
    "autocast lowers the sums": (
        (safety.test_autocast_changes_nothing, "chunked"),
        "enabled=False)", 'enabled=torch.is_autocast_enabled("cpu"))'),
    "a state holds the whole sequence": (  # PyTorch #40157
        (models.test_a_state_is_small_and_holds_no_other_memory,),
        "x[:, x.shape[1] - num_past :].clone()", "x[:, x.shape[1] - num_past :]"),
    # linear-attention-transformer and others: 2 GiB at B 4, H 8, N 2048 in float32
    "a state for every token": (
        (forms.test_no_form_keeps_a_state_per_token,),
        "num_chunks = 1 if torch", "chunk_size = 1\n    num_chunks = 1 if torch"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_published_bug_is_noticed(bug, monkeypatch):
    """By a test that a copy without the bug passes."""
    (test, *arguments), old, new = BUGS[bug]
    monkeypatch.setattr(sys.modules[test.__module__], "model", load_model(SOURCE))
    test(*arguments)
    monkeypatch.setattr(sys.modules[test.__module__], "model", mutant(old, new))
    with pytest.raises(AssertionError):
        test(*arguments)
