"""The checkers of lesson 1: softmax and the query norm."""

from __future__ import annotations

import math

import torch

from nala_min import model
from nala_min.course.checks import (
    Wrong,
    assert_close,
    check_weights,
    close,
    exercise,
    features,
    gradients,
    output,
    random_normal,
)


@exercise(
    1,
    "What does (3) do with weights that do not sum to 1, and with a weight of 0?",
    "Divide by the sum over the last axis; then sum -share * log(share) over that axis.",
    "0 * log(0) is NaN in floating point: clamp the share at 1e-300, but only in the logarithm.",
)
def check_entropy(student):
    weights = features(2, 3, 5)
    shares = weights / weights.sum(dim=-1, keepdim=True)
    got, expected = output(student, shares, shape=(2, 3)), model.entropy(shares)
    if (got < 0).any():
        raise Wrong("An entropy is negative: Eq. (3) begins with a minus sign.")
    in_bits = expected / math.log(2)
    assert_close(
        got, expected, "The entropy", {"It is in bits: take the natural logarithm.": in_bits}
    )
    if not close(output(student, weights, shape=(2, 3)), got):
        raise Wrong("Weights that do not sum to 1 change the entropy: divide by their sum first.")
    for scale in (1e-20, 1e6):
        if not close(output(student, scale * weights, shape=(2, 3)), got):
            raise Wrong(f"Weights times {scale:g} change the entropy: use no eps and no clamp.")
    zeros, case = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]).double(), " (weights of 0)"
    got = output(student, zeros, shape=(2,), case=case)
    assert_close(got, model.entropy(zeros), f"The entropy{case}")
    gradients(student, zeros, case=case)


@exercise(
    1,
    "Scores first: one matrix product gives q_t . k_i for every pair, (B, H, N, N).",
    "Divide by the square root of D. Which axis of the scores runs over keys?",
    "If causal, set the scores above the diagonal to -inf before the softmax, not to 0 after it.",
    "exp overflows: mask with -inf first, then subtract each row's largest score, or call softmax.",
)
def check_softmax_weights(student):
    def reference(q, k, causal=False):
        return model.attention_weights(q, k, feature_map="softmax", causal=causal)

    def why(bad):
        if scale > 1:
            return "exp overflows: subtract each row's largest score first, or call softmax."
        if bad[..., 1:, :].any():
            return "inf times 0 is NaN: use masked_fill." if causal else ""
        return "Token 0 sees no key, not even itself: mask strictly above the diagonal."

    for size, tokens in ((3, 7), (5, 4)):
        q, k = random_normal(2, 2, 3, tokens, size)
        shape, visible = (2, 3, tokens, tokens), torch.ones(tokens, tokens, dtype=torch.bool)
        root, by_n = math.sqrt(size), reference(q * math.sqrt(size / tokens), k)
        mistakes = {
            "The scores are not divided by the square root of D.": reference(q * root, k),
            "The scores are divided by D, not by its square root.": reference(q / root, k),
            "The scores are divided by the square root of N, not of D.": by_n,
            "Queries and keys are swapped.": reference(k, q),
        }
        for causal in (False, True):
            for scale, large in ((1, ""), (1e4, ", large scores"), (1e10, ", huge scores")):
                case, seen = f" (causal={causal}{large})", visible.tril() if causal else visible
                weights = output(student, scale * q, k, causal, shape=shape, case=case, why=why)
                columns = weights.sum(dim=-2)
                if scale == 1 and close(columns, torch.ones_like(columns)):
                    raise Wrong("The weights of a key sum to 1: take the softmax over the keys.")
                if scale == 1:  # otherwise a visible weight may be 0
                    check_weights(weights, seen, case)
                elif (weights * ~seen).any():
                    raise Wrong(f"A score falls below the mask{case}: hide the future with -inf.")
                expected = reference(scale * q, k, causal)
                assert_close(weights, expected, f"The weight (D={size}){case}", mistakes)


@exercise(
    1,
    "Eq. (4) is the closed form: what are p, the mean of s under p, and the variance under p?",
    "p = softmax(c * scores). Weight s_i in the mean by p_i, and (s_i - mean)^2 as well.",
)
def check_entropy_slope(student):
    def slope(p, mean):
        return -c * (p * (s - mean).square()).sum(dim=-1)

    s = random_normal(2, 3, 5)
    for c in (0.7, 1.6):
        variable = torch.full((2, 3, 1), c, dtype=torch.float64, requires_grad=True)
        p = torch.softmax(variable * s, dim=-1)
        expected = torch.autograd.grad(model.entropy(p).sum(), variable)[0][..., 0]
        p, other = p.detach(), torch.softmax(s, dim=-1)
        mean = (other * s).sum(dim=-1, keepdim=True)
        mistakes = {
            "The factor c is missing.": expected / c,
            "There is one factor c too many.": c * expected,
            "It takes the variance of c * scores, not of the scores.": c**2 * expected,
            "It takes the standard deviation, not the variance.": -c * (-expected / c).sqrt(),
            "The mean is not subtracted from the scores before they are squared.": slope(p, 0),
            "The mean of the scores is not weighted by p.": slope(p, s.mean(dim=-1, keepdim=True)),
            "The variance is not weighted by p.": -c * s.var(dim=-1, correction=0),
            "The variance is not weighted by p, but divided by N - 1.": -c * s.var(dim=-1),
            "c is missing in p = softmax(c * scores).": slope(other, mean),
        }
        assert_close(output(student, s, c, shape=(2, 3)), expected, f"The slope (c={c})", mistakes)
