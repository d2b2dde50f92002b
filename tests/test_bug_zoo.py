"""The bug zoo: errors that published linear attentions shipped, and some that an image invites,
planted in a copy of model.py. Each must be rejected by the proof that is named beside it, or the
proof proves nothing."""

import pytest
import test_edits
import test_model as proofs
import torch
from mutants import SOURCE, load_model, mutant

# name: (old code, new code, proof, its arguments). The project and thread of each real bug stand in
# the comment above it.
ZOO = {
    # flash-linear-attention #1263
    "padding keys stay in the normaliser": (
        "phi_k = phi_k.masked_fill(~key_mask[:, None, :, None], 0.0)",
        "v = v.masked_fill(~key_mask[:, None, :, None], 0.0)",
        proofs.test_padding_changes_nothing,
        {"feature_map": "cosine", "mode": "bidirectional", "side": "right"},
    ),
    # flash-linear-attention #594, #850
    "normaliser summed over heads": (
        "numerator, normaliser = sums[..., :-1], sums[..., -1:]",
        "numerator, normaliser = sums[..., :-1], sums[..., -1:].sum(1, keepdim=True)",
        proofs.test_heads_and_batches_do_not_mix,
        {"mode": "chunked"},
    ),
    # performer-pytorch #40
    "multiplied by the denominator": (
        "out = numerator / normaliser.masked_fill(normaliser == 0, math.inf)",
        "out = numerator * normaliser",
        proofs.test_published_forms,
        {"case": "cosine/unit"},
    ),
    # flash-linear-attention #267
    "decoding forgets the earlier keys' normaliser": (
        "if causal and state is None:",
        "if causal and state is not None:\n"
        "            state = F.pad(state[..., :-1], (0, 1))\n"
        "        if causal and state is None:",
        proofs.test_causal_forms_equal_the_loop,
        {"feature_map": "cosine", "form": "cut and resumed", "num_tokens": 7},
    ),
    # flash-linear-attention #875
    "no gradient through the denominator": (
        "out = numerator / normaliser.masked_fill",
        "out = numerator / normaliser.detach().masked_fill",
        proofs.test_gradcheck,
        {"feature_map": "cosine", "mode": "chunked"},
    ),
    # lightning-attention #28
    "the rows after the last whole chunk are lost": (
        "num_chunks = -(-num_tokens // chunk_size)",
        "whole = num_tokens // chunk_size * chunk_size\n"
        "    phi_q = F.pad(phi_q[:, :, :whole], (0, 0, 0, num_tokens - whole))\n"
        "    num_chunks = -(-num_tokens // chunk_size)",
        proofs.test_causal_forms_equal_the_loop,
        {"feature_map": "cosine", "form": "chunked by 64", "num_tokens": 65},
    ),
    # linear-attention-transformer, bucket size above 1
    "a chunk does not see its own tokens": (
        "intra = (q @ k.mT).tril() @ v",
        "intra = (q @ k.mT).tril(-1) @ v",
        proofs.test_causal_forms_equal_the_loop,
        {"feature_map": "cosine", "form": "chunked by 16", "num_tokens": 63},
    ),
    "a chunk sees its own future": (
        "intra = (q @ k.mT).tril() @ v",
        "intra = (q @ k.mT) @ v",
        proofs.test_the_future_changes_no_past_output,
        {"feature_map": "cosine", "mode": "chunked", "size": 1.0},
    ),
    "a chunk sees the state after itself": (
        "inter = q @ states[:, :, :-1]",
        "inter = q @ states[:, :, 1:]",
        proofs.test_the_future_changes_no_past_output,
        {"feature_map": "elu", "mode": "chunked", "size": 1.0},
    ),
    # performer-pytorch: stabiliser over the whole sequence
    "keys scaled by the largest of the whole sequence": (
        "phi_k = key_features(at_least_float32(k))  # (B, H, N, F)",
        "phi_k = key_features(at_least_float32(k))\n"
        "        phi_k = phi_k / phi_k.amax((2, 3), keepdim=True)",
        proofs.test_the_future_changes_no_past_output,
        {"feature_map": "cosine", "mode": "chunked", "size": 1e9},
    ),
    # the published forms of NaLaFormer
    "a zero query is NaN": (
        "x / norm.masked_fill(norm == 0, 1.0)",
        "x / norm",
        proofs.test_degenerate_inputs_stay_finite,
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
        proofs.test_degenerate_inputs_stay_finite,
        {
            "feature_map": "cosine",
            "mode": "bidirectional",
            "damage": "exact-zero channels",
            "dtype": torch.float32,
            "num_tokens": 6,
        },
    ),
    "no mass is NaN": (
        "normaliser.masked_fill(normaliser == 0, math.inf)",
        "normaliser",
        proofs.test_no_mass_gives_output_and_gradient_zero,
        {"feature_map": "relu", "mode": "quadratic", "nothing": "keys"},
    ),
    "an eps swallows small keys": (
        "normaliser.masked_fill(normaliser == 0, math.inf)",
        "(normaliser + 1e-6)",
        proofs.test_rows_sum_to_one,
        {"feature_map": "cosine", "mode": "bidirectional", "query_scale": 1.0, "key_scale": 1e-2},
    ),
    # flash-linear-attention #1261
    "elu + 1 is rounded to 0": (
        "F.relu(x) + x.masked_fill(x > 0, 0.0).exp()",
        "F.elu(x) + 1",
        proofs.test_elu_survives_very_negative_bfloat16,
        {},
    ),
    # fast-transformers #32, Sana #267
    "half precision is not summed in float32": (
        "return x.to(torch.promote_types(x.dtype, torch.float32))  # a",
        "return x  # a",
        proofs.test_half_precision_counts_to_many_tokens,
        {"feature_map": "cosine", "reference": True, "causal": True, "dtype": torch.float16},
    ),
    "autocast lowers the sums": (
        'with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):',
        "if True:",
        proofs.test_autocast_changes_nothing,
        {"mode": "chunked"},
    ),
    # linear-attention-transformer and others: 2 GiB at B 4, H 8, N 2048 in float32
    "a state for every token": (
        "num_chunks = -(-num_tokens // chunk_size)",
        "chunk_size, num_chunks = 1, num_tokens",
        proofs.test_chunked_form_keeps_no_state_for_each_token,
        {"mode": "chunked"},
    ),
    # two third-party ports of NaLaFormer
    "the power is put on the norm, which cancels": (
        "torch.exp2(power * torch.log2(ratio.clamp_min(tiny)))",
        "ratio * (1 + power)",
        proofs.test_query_norm_acts_as_an_exponent,
        {"feature_map": "cosine"},
    ),
    "a LayerNorm on q erases its norm": (
        "norm, direction = decompose(q)",
        "norm, direction = decompose(F.layer_norm(q, q.shape[-1:]))",
        proofs.test_query_norm_acts_as_an_exponent,
        {"feature_map": "split"},
    ),
    # the mapping without its quarter of pi: cos(2) < 0
    "angles span more than a quarter turn": (
        "return torch.cat([magnitude * complement.sin(), magnitude * theta.sin()], dim=-1)",
        "angle = torch.tanh(alpha * direction)\n"
        "    return torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1)",
        proofs.test_weights_are_not_negative,
        {"feature_map": "cosine", "dtype": torch.float64},
    ),
    # the published mapping, whose two features cancel
    "angles about zero round to negative weights": (
        "return torch.cat([magnitude * complement.sin(), magnitude * theta.sin()], dim=-1)",
        "angle = theta - math.pi / 4\n"
        "    return torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1)",
        proofs.test_weights_are_not_negative,
        {"feature_map": "cosine", "dtype": torch.float32},
    ),
    # none of these is known from elsewhere: ways to get an image wrong
    "a patch sees only those before it": (
        '"causal": self.causal,',
        '"causal": True,',
        proofs.test_every_patch_sees_every_other,
        {"attention": "nala"},
    ),
    "patches are taken column by column": (
        "x.flatten(1, -2).unflatten(",
        "x.transpose(1, -2).flatten(1, -2).unflatten(",
        proofs.test_split_heads_takes_patches_row_by_row,
        {},
    ),
    "rope counts patches along one line": (
        "position + torch.cartesian_prod(*axes).view(-1, len(axes))",
        "position + torch.arange(x.shape[1] * x.shape[2])[:, None]",
        proofs.test_rope_on_a_grid_knows_row_and_column,
        {"attention": "nala"},
    ),
    "the first attention is that of the last block": (
        "else tuple(self.attention)",
        "else tuple(self.attention)[::-1]",
        proofs.test_each_block_has_the_attention_that_is_named_for_it,
        {"names": ("nala", "softmax")},
    ),
    "the images of a batch share their attention": (
        "o = o.transpose(1, 2).reshape(x.shape)",
        "o = o.mean(0, keepdim=True).expand_as(o).transpose(1, 2).reshape(x.shape)",
        proofs.test_the_images_of_a_batch_do_not_mix,
        {"options": {}, "training": False},
    ),
    "an image is mirrored at its edges": (
        "padding=padding, groups=dim)",
        'padding=padding, groups=dim, padding_mode="zeros" if causal else "reflect")',
        proofs.test_gated_block_on_a_grid_by_hand,
        {"attention": "nala"},
    ),
}


# Ours: fast.py was sure that the features were the paper's, so that outputs of an edited model.py
# were right and its gradients silently wrong.
SURE = ("n / (1 + n) for tanh", "a linear angle", "one factor more in the key")


@pytest.mark.parametrize("name", SURE)
def test_a_gradient_that_is_silently_wrong_is_rejected(monkeypatch, name):
    broken = test_edits.edited(name)
    test_edits.check_gradients(broken, True, 17)
    monkeypatch.setattr(test_edits.fast, "verify", test_edits.trusting)
    test_edits.check_outputs(broken, True, 17)
    with pytest.raises(AssertionError):
        test_edits.check_gradients(broken, True, 17)


@pytest.mark.parametrize("name", ZOO)
def test_a_published_bug_is_rejected(model, name):
    old, new, proof, arguments = ZOO[name]
    proof(model, **arguments)  # the proof accepts the code as it is
    torch.manual_seed(0)
    broken = mutant(old, new)
    with pytest.raises(AssertionError):
        proof(broken, **arguments)


def test_a_copy_without_a_bug_is_accepted():
    """The copies are rejected for their bugs, not for being copies."""
    copy = load_model(SOURCE)
    for _, _, proof, arguments in ZOO.values():
        torch.manual_seed(0)
        proof(copy, **arguments)
