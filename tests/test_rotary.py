"""The released code's rotary positions, Eq. (17), in relatives.py."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from nala_min import key_features, query_features
from nala_min.relatives import rotary_angles, rotary_attention, rotate

RELEASED = np.load(Path(__file__).parent / "released_rotary.npz")


@pytest.mark.parametrize("case", sorted({name.rpartition("/")[0] for name in RELEASED.files}))
def test_released_rotary(case):
    """(17) for images: outputs equal those of the released code with eps = 0."""
    q, k, v, grid, exact = (
        torch.from_numpy(RELEASED[f"{case}/{x}"]) for x in ("q", "k", "v", "grid", "exact")
    )
    positions = torch.cartesian_prod(*(torch.arange(int(size)) for size in grid))
    assert_close(rotary_attention(q, k, v, positions), exact, rtol=1e-9, atol=1e-9)


def rotated_by_hand(features, position, dim):
    """Rotate channels 2j and 2j + 1 of each sign half by position times the j-th frequency."""
    out = features.clone()
    for start in range(0, features.shape[-1], dim):
        for j in range(dim // 2):
            angle = position * 10000.0 ** (-j / max(dim // 2 - 1, 1))
            x, y = features[..., start + 2 * j], features[..., start + 2 * j + 1]
            out[..., start + 2 * j] = x * math.cos(angle) - y * math.sin(angle)
            out[..., start + 2 * j + 1] = x * math.sin(angle) + y * math.cos(angle)
    return out


@pytest.mark.parametrize("feature_map", ["cosine", "split", "elu"])
def test_rotary_turns_only_the_numerator(feature_map):
    """(17) for text, against a loop. The first query is zero: only elu gives it mass."""
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64)
    q[:, :, 0] = 0
    phi_q, phi_k = query_features(q, feature_map), key_features(k, feature_map)
    rows = []
    for t in range(7):
        numerator = mass = 0
        for i in range(7):
            turned = (rotated_by_hand(x[:, :, n], n, 4) for x, n in ((phi_q, t), (phi_k, i)))
            numerator = numerator + math.prod(turned).sum(-1, keepdim=True) * v[:, :, i]
            mass = mass + (phi_q[:, :, t] * phi_k[:, :, i]).sum(-1, keepdim=True)
        rows.append(numerator / torch.where(mass > 0, mass, math.inf))
    got = rotary_attention(q, k, v, torch.arange(7)[:, None], feature_map)
    assert_close(got, torch.stack(rows, 2), rtol=1e-10, atol=1e-10)


def test_rotary_angles_split_the_channels_between_the_axes():
    """(17) for images: half of the angles encode the row and half the column, and the last
    frequency of each is 1 / 10,000. PyTorch's default dtype changes no angle."""
    positions = torch.tensor([[0, 0], [0, 3], [2, 0], [5, 7]])
    want = [[r, r / 1e4, s, s / 1e4] for r, s in positions.tolist()]
    assert_close(rotary_angles(positions, 8), torch.tensor(want, dtype=torch.float64))
    assert_close(rotary_angles(positions, 4), positions.double())  # one frequency each
    with pytest.raises(ValueError, match="D must be divisible by 4 for 2 axes, got 6"):
        rotary_angles(positions, 6)
    positions = torch.arange(3000)[:, None]
    want = rotary_angles(positions, 8)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(rotary_angles(positions, 8), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_rotation_keeps_dtype_and_shape():
    rotated = rotate(torch.randn(3, 4), torch.rand(3, 2, dtype=torch.float64))
    assert rotated.dtype == torch.float32 and rotated.shape == (3, 4)
