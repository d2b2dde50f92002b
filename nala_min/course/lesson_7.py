"""The checkers of lesson 7: the wider family."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nala_min.course.checks import (
    assert_close,
    assert_gradients_close,
    exercise,
    features,
    output,
    random_normal,
)

SHAPE = (2, 3, 5, 6)  # shape of a state, (B, H, F, M)


def _outer(k, v):
    return k[..., :, None] * v[..., None, :]


@exercise(
    7,
    "There are two steps, in this order: multiply the state, then add the token.",
    "decay has one number per feature, so per row of the state: add a last axis to it.",
)
def check_decay_step(student):
    def reference(state, k, v, decay):
        return decay[..., None] * state + _outer(k, v)

    state, k, v = random_normal(*SHAPE), features(2, 3, 5), random_normal(2, 3, 6)
    decay = torch.rand(2, 3, 5, dtype=torch.float64)
    out = output(student, state, k, v, decay, shape=SHAPE)
    mistakes = {
        "The past does not fade.": state + _outer(k, v),
        "The new token also fades: write it after the decay.": (
            decay[..., None] * (state + _outer(k, v))
        ),
        "The new token is not written.": decay[..., None] * state,
        "The past is forgotten.": _outer(k, v),
        "The past is multiplied by 1 - decay.": (1 - decay[..., None]) * state + _outer(k, v),
        "The key fades, not the past.": state + _outer(decay * k, v),
        "It uses the same decay for every feature.": (
            decay.mean(dim=-1)[..., None, None] * state + _outer(k, v)
        ),
    }
    assert_close(out, reference(state, k, v, decay), "The state", mistakes)
    assert_gradients_close(student, reference, state, k, v, decay)


@exercise(
    7,
    "What does the key read before the token is written? k S, one number per channel of v.",
    "The state grows by the outer product of k with the error: v minus what k reads.",
    "share multiplies the whole error: with share = 1, the key reads v afterwards.",
)
def check_delta_step(student):
    def read(state, k):
        return (k[..., None, :] @ state).squeeze(-2)

    def reference(state, k, v, share):
        return state + _outer(k, share[..., None] * (v - read(state, k)))

    state, v = random_normal(*SHAPE), random_normal(2, 3, 6)
    k = F.normalize(features(2, 3, 5), dim=-1)
    share = torch.rand(2, 3, dtype=torch.float64)
    out = output(student, state, k, v, share, shape=SHAPE)
    part = share[..., None]
    mistakes = {
        "It only adds, like linear attention: subtract what the key reads.": state + _outer(k, v),
        "It adds a share of v, but removes nothing.": state + _outer(k, part * v),
        "share is missing: it replaces everything that the key reads.": (
            state + _outer(k, v - read(state, k))
        ),
        "share multiplies what is removed, but not v.": (
            state + _outer(k, v - part * read(state, k))
        ),
        "share multiplies v, but not what is removed.": (
            state + _outer(k, part * v - read(state, k))
        ),
        "It removes, but writes nothing.": state - _outer(k, part * read(state, k)),
        "It moves away from v: the difference has the wrong sign.": (
            state - _outer(k, part * (v - read(state, k)))
        ),
    }
    assert_close(out, reference(state, k, v, share), "The state", mistakes)
    assert_gradients_close(student, reference, state, k, v, share)
    after = output(student, state, k, v, torch.ones_like(share), shape=SHAPE, case=" (share=1)")
    assert_close(read(after, k), v, "The value that the key reads afterwards (share=1)")
