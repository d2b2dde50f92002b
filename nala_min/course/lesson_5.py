"""The checkers of lesson 5: from quadratic to linear."""

from __future__ import annotations

import torch
from torch import Tensor

from nala_min import model
from nala_min.course.checks import (
    Wrong,
    assert_close,
    assert_gradients_close,
    call,
    check_cost,
    check_linear,
    close,
    exercise,
    features,
    random_normal,
    valid_tensor,
)


@exercise(
    5,
    "Which comes first in (14): adding the new token to the state, or reading the state?",
    "[v 1] has M + 1 channels; the state grows by the outer product of phi_k with it.",
    "One product phi_q S gives M + 1 numbers: the last is the normaliser of the others.",
)
def check_recurrent_step(student):
    def reference(state, *token):
        options = {"causal": True, "feature_map": "relu", "state": state, "return_state": True}
        out, state = model.nala_attention(*(x[:, :, None] for x in token), **options)
        return out[:, :, 0], state

    def run(state, *token, case):
        result = call(student, state, *token)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise Wrong("It must return two tensors, the output and the new state.")
        if isinstance(result[0], Tensor) and result[0].shape == state.shape:
            raise Wrong("The two are in the wrong order: return the output first, then the state.")
        out = valid_tensor(result[0], (2, 3, 6), "The output", case)
        return out, valid_tensor(result[1], (2, 3, 5, 7), "The state", case)

    (phi_q, phi_k), v = features(2, 2, 3, 4, 5), random_normal(2, 3, 4, 6)
    state = torch.zeros(2, 3, 5, 7).double()
    for t in range(4):
        q, k, value = (x[:, :, t] for x in (phi_q, phi_k, v))
        case = f" (token {t}, which sees itself)"
        out, after = run(state, q, k, value, case=case)
        expected_out, expected = reference(state, q, k, value)
        stale, counted = (torch.cat([expected[..., :-1], state[..., -1:] + x], -1) for x in (0, 1))
        mistakes = {
            "The state forgets the earlier tokens.": expected - state,
            "The new token is not added to the state.": state,
            "The normaliser, the last column of the state, does not grow.": stale,
            "The normaliser is in the first column of the state.": expected.roll(1, dims=-1),
            "The normaliser counts tokens: it must grow by phi_k, not by 1.": counted,
        }
        assert_close(after, expected, f"The state{case}", mistakes)
        unseen, _ = reference(state, q, 0 * k, value)
        numerator = torch.einsum("bhf,bhfm->bhm", q, expected[..., :-1])
        mistakes = {
            "The token does not see itself: add it before you read the state.": unseen,
            "The output is not divided by the normaliser.": numerator,
        }
        assert_close(out, expected_out, f"The output{case}", mistakes)
        state = expected
    q, case = q.clone(), " (a query is zero)"
    q[0, 0] = 0.0
    out, _ = run(state, q, k, value, case=case)
    assert_close(out, reference(state, q, k, value)[0], f"The output{case}")

    def joined(step):
        def function(state, phi_q, phi_k, v):
            return torch.cat([x.flatten() for x in step(state, phi_q, phi_k, v)])

        return function

    assert_gradients_close(joined(student), joined(reference), state, q, k, value, case=case)
    q = phi_q[:, :, -1]
    out, _ = run(0 * state, q / 1e6, k / 1e6, value, case=" (small features)")
    if not close(out, value):
        raise Wrong("Features a million times smaller change the output: an eps is not small then.")
    out, _ = run(0 * state, q, 0 * k, value, case=" (all keys zero)")
    assert_close(out, 0 * out, "The output (all keys zero)")


@exercise(
    5,
    "A chunk needs the sum of phi_k^T [v 1] over the chunks before it, and a tril within itself.",
    "Carry that sum from chunk to chunk: first read it, then add the chunk to it.",
    "The last chunk may be shorter: slicing takes care of it. Divide once, at the end.",
)
def check_chunked_attention(student):
    for chunk_size in (3, 1, 7, 9):

        def late(phi_q, phi_k, chunk_size=chunk_size):
            chunk = torch.arange(7) // chunk_size
            before, own = chunk[:, None] >= chunk, (chunk[:, None] == chunk).tril()
            weights = phi_q @ phi_k.mT * (before.double() + own)
            return weights / weights.sum(dim=-1, keepdim=True)

        check_linear(student, True, chunk_size, late=late)
    check_cost(student, 64)
