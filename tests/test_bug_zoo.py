"""The bug zoo: bugs that published linear attentions shipped, and some that are likely with images,
each in a copy of model.py. The test named with a bug must fail, or that test proves nothing."""

import pytest
import test_edits
import test_model
import torch
from mutants import SOURCE, load_model, mutant

# name: (old code, new code, test, its arguments). Comments name the project and issue of real bugs.
ZOO = {
    # flash-linear-attention #1263
    "padding keys stay in the normaliser": (
        "phi_k = phi_k.masked_fill(~key_mask[:, None, :, None], 0.0)",
        "v = v.masked_fill(~key_mask[:, None, :, None], 0.0)",
        test_model.test_padding_changes_nothing,
        {"feature_map": "cosine", "mode": "bidirectional", "side": "right"},
    ),
    # flash-linear-attention #594, #850
    "normaliser summed over heads": (
        "numerator, normaliser = sums[..., :-1], sums[..., -1:]",
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
        "if causal and state is None:",
        "if causal and state is not None:\n"
        "            state = F.pad(state[..., :-1], (0, 1))\n"
        "        if causal and state is None:",
        test_model.test_causal_forms_equal_the_loop,
        {"feature_map": "cosine", "form": "cut and resumed", "num_tokens": 7},
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
        "num_chunks = -(-num_tokens // chunk_size)",
        "whole = num_tokens // chunk_size * chunk_size\n"
        "    phi_q = F.pad(phi_q[:, :, :whole], (0, 0, 0, num_tokens - whole))\n"
        "    num_chunks = -(-num_tokens // chunk_size)",
        test_model.test_causal_forms_equal_the_loop,
        {"feature_map": "cosine", "form": "chunked by 64", "num_tokens": 65},
    ),
    # linear-attention-transformer, bucket size above 1
    "a chunk does not see its own tokens": (
        "intra = (q @ k.mT).tril() @ v",
        "intra = (q @ k.mT).tril(-1) @ v",
        test_model.test_causal_forms_equal_the_loop,
        {"feature_map": "cosine", "form": "chunked by 16", "num_tokens": 63},
    ),
    "a chunk sees its own future": (
        "intra = (q @ k.mT).tril() @ v",
        "intra = (q @ k.mT) @ v",
        test_model.test_the_future_changes_no_past_output,
        {"feature_map": "cosine", "mode": "chunked", "size": 1.0},
    ),
    "a chunk sees the state after itself": (
        "inter = q @ states[:, :, :-1]",
        "inter = q @ states[:, :, 1:]",
        test_model.test_the_future_changes_no_past_output,
        {"feature_map": "elu", "mode": "chunked", "size": 1.0},
    ),
    # performer-pytorch: stabiliser over the whole sequence
    "keys scaled by the largest of the whole sequence": (
        "phi_k = key_features(at_least_float32(k))  # (B, H, N, F)",
        "phi_k = key_features(at_least_float32(k))\n"
        "        phi_k = phi_k / phi_k.amax((2, 3), keepdim=True)",
        test_model.test_the_future_changes_no_past_output,
        {"feature_map": "cosine", "mode": "chunked", "size": 1e9},
    ),
    # the published forms of NaLaFormer
    "a zero query gives NaN": (
        "x / norm.masked_fill(norm == 0, 1.0)",
        "x / norm",
        test_model.test_degenerate_inputs_stay_finite,
        {
            "feature_map": "cosine",
            "mode": "chunked",
            "damage": "zero query row",
            "dtype": torch.float32,
            "num_tokens": 6,
        },
    ),
    "an exact-zero channel has a NaN gradient": (
        "torch.exp2(power * torch.log2(ratio.clamp_min(tiny)))",
        "torch.exp2(power * torch.log2(ratio))",
        test_model.test_degenerate_inputs_stay_finite,
        {
            "feature_map": "cosine",
            "mode": "bidirectional",
            "damage": "exact-zero channels",
            "dtype": torch.float32,
            "num_tokens": 6,
        },
    ),
    "zero mass gives NaN": (
        "normaliser.masked_fill(normaliser == 0, math.inf)",
        "normaliser",
        test_model.test_no_mass_gives_output_and_gradient_zero,
        {"feature_map": "relu", "mode": "quadratic", "cause": "keys"},
    ),
    "an eps swallows small keys": (
        "normaliser.masked_fill(normaliser == 0, math.inf)",
        "(normaliser + 1e-6)",
        test_model.test_rows_sum_to_one,
        {"feature_map": "cosine", "mode": "bidirectional", "query_scale": 1.0, "key_scale": 1e-2},
    ),
    # flash-linear-attention #1261
    "elu + 1 is rounded to 0": (
        "F.relu(x) + x.masked_fill(x > 0, 0.0).exp()",
        "F.elu(x) + 1",
        test_model.test_elu_survives_very_negative_bfloat16,
        {},
    ),
    # fast-transformers #32, Sana #267
    "half precision is not summed in float32": (
        "return x.to(torch.promote_types(x.dtype, torch.float32))  # a",
        "return x  # a",
        test_model.test_half_precision_sums_over_many_tokens,
        {"feature_map": "cosine", "reference": True, "causal": True, "dtype": torch.float16},
    ),
    "autocast lowers the sums": (
        'with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):',
        "if True:",
        test_model.test_autocast_changes_nothing,
        {"mode": "chunked"},
    ),
    # linear-attention-transformer and others: 2 GiB at B 4, H 8, N 2048 in float32
    "a state for every token": (
        "num_chunks = -(-num_tokens // chunk_size)",
        "chunk_size, num_chunks = 1, num_tokens",
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
        "return torch.cat([magnitude * complement.sin(), magnitude * theta.sin()], dim=-1)",
        "angle = torch.tanh(alpha * direction)\n"
        "    return torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1)",
        test_model.test_weights_are_not_negative,
        {"feature_map": "cosine", "dtype": torch.float64},
    ),
    # the published cosine map: its two features cancel
    "angles about zero round to negative weights": (
        "return torch.cat([magnitude * complement.sin(), magnitude * theta.sin()], dim=-1)",
        "angle = theta - math.pi / 4\n"
        "    return torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1)",
        test_model.test_weights_are_not_negative,
        {"feature_map": "cosine", "dtype": torch.float32},
    ),
    # not from other projects: likely bugs with images
    "a patch sees only those before it": (
        '"causal": self.causal,',
        '"causal": True,',
        test_model.test_every_patch_sees_every_other,
        {"attention": "nala"},
    ),
    "patches are taken column by column": (
        "x.flatten(1, -2).unflatten(",
        "x.transpose(1, -2).flatten(1, -2).unflatten(",
        test_model.test_split_heads_takes_patches_row_by_row,
        {},
    ),
    "rope counts patches along one line": (
        "position + torch.cartesian_prod(*axes).view(-1, len(axes))",
        "position + torch.arange(x.shape[1] * x.shape[2])[:, None]",
        test_model.test_rope_on_a_grid_encodes_row_and_column,
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
        test_model.test_the_images_of_a_batch_do_not_mix,
        {"options": {}, "training": False},
    ),
    "an image is mirrored at its edges": (
        "padding=padding, groups=dim)",
        'padding=padding, groups=dim, padding_mode="zeros" if causal else "reflect")',
        test_model.test_gated_block_on_a_grid_by_hand,
        {"attention": "nala"},
    ),
}


# Our own bug: fast.py took all features for the paper's. After an edit to model.py, outputs were
# correct, but gradients were silently wrong.
UNDETECTED_EDITS = ("n / (1 + n) for tanh", "a linear angle", "an extra factor in the key")


@pytest.mark.parametrize("name", UNDETECTED_EDITS)
def test_a_silently_wrong_gradient_is_rejected(monkeypatch, name):
    broken = test_edits.edited(name)
    test_edits.check_gradients(broken, True, 17)
    monkeypatch.setattr(test_edits.fast, "verify", test_edits.trusting_verify)
    test_edits.check_outputs(broken, True, 17)
    with pytest.raises(AssertionError):
        test_edits.check_gradients(broken, True, 17)


@pytest.mark.parametrize("name", ZOO)
def test_a_published_bug_is_rejected(model, name):
    old, new, test, arguments = ZOO[name]
    test(model, **arguments)  # the original passes
    torch.manual_seed(0)
    broken = mutant(old, new)
    with pytest.raises(AssertionError):
        test(broken, **arguments)


def test_a_copy_without_a_bug_is_accepted():
    """The copies are rejected for their bugs, not for being copies."""
    copy = load_model(SOURCE)
    for _, _, test, arguments in ZOO.values():
        torch.manual_seed(0)
        test(copy, **arguments)
