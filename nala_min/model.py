"""NaLaFormer in one file, to be read from top to bottom.

Norm-Aware Linear Attention, arXiv 2506.21137 (ICML 2026 as "Norm x Direction"). Softmax attention
gets sharper as a query's norm grows. Linear attention divides that norm away and clips negative
values. NaLa writes a query as norm x direction, returns the norm as the exponent of a power kernel,
and sends directions through cosines, so that every weight is non-negative and nothing is clipped.

Glossary. The numbers (1) ... (17) are used in every comment, test and notebook of the project.

  symbol     name in the code       shape                     equation
  q, k, v    q, k, v                (B, H, N, D), v: M for D  queries, keys and values of H heads
  |x|, d(x)  norm, direction        (..., 1), (..., D)        (2)  x = norm * direction
  PSE        entropy                (B, H, N)                 (3)  log of how many keys count
  p          power                  (..., 1)                  (7)  lam * (tau + tanh(norm))
  a          magnitude              (..., D)                  (7)  query |d|^p, (8) key |k|^lam
  theta      angle                  (..., D)                  (9)  pi/4 * tanh(alpha d), here + pi/4
  phi        phi_q, phi_k           (..., F)                  (9)  [a cos(theta); a sin(theta)]
  [v 1]      values                 (B, H, N, M + 1)          (13) value, and 1 for the normaliser
  (S, z)     state                  (B, H, F, M + 1)          (14) sum over tokens of phi(k)^T [v 1]

  B batch, H heads, N tokens, D channels of a head, M channels of a value; F features, which are 2D,
  or D for the baselines; C tokens in each of T chunks; E width of the model, W of its convolution,
  V characters; R rows of S patches of an image (N = R S), each of P x P pixels; Y classes.

Contents: 1 decomposition (2), 2 kernel (7, 8, 12), 3 cosine mapping (9, 10, 11), 4 features,
5 attention forms (5, 13, 13c, 14, 15, 17), 6 softmax (1), weights and entropy (3), 7 gated block
(16), 8 language model, 9 image model. `@checked` names the shapes of a function's arguments, and
refuses others: see arguments.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nala_min import fast
from nala_min.arguments import check, checked

FEATURE_MAPS = ("cosine", "split", "elu", "relu")
MODES = ("auto", "parallel", "chunked", "recurrent")

# --- 1. Decomposition: norm x direction ----------------------------------------------------------


@checked(x="... D")
def decompose(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split vectors into norm and direction, Eq. (2): x = norm * direction.

    x: (..., D). Returns norm (..., 1) and direction (..., D). A zero vector has direction 0 and
    finite gradients.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (..., 1)
    direction = x / norm.masked_fill(norm == 0, 1.0)  # (..., D)
    return norm, direction


# --- 2. Kernel: the query norm becomes an exponent -----------------------------------------------


@checked(norm="...", norm_scale="...")
def query_power(
    norm: Tensor, lam: float = 3.0, tau: float = 0.5, norm_scale: float | Tensor = 1.0
) -> Tensor:
    """Exponent that turns a query's norm into sharpness, Eq. (7).

    norm: (..., 1), non-negative. Returns (..., 1) in [lam * tau, lam * (tau + 1)).
    norm_scale is an extension of ours, tanh(norm / norm_scale): the paper's tanh is flat beyond a
    norm of about 2, while the norm of D unit-variance channels is about sqrt(D).
    """
    return lam * (tau + torch.tanh(norm / norm_scale))  # (..., 1)


@checked(direction="... D", power="... 1")
def query_magnitude(direction: Tensor, power: Tensor) -> Tensor:
    """Magnitude |d|^p of a query's channels, Eq. (7), the largest scaled to 1, Eq. (12).

    direction: (..., D), power: (..., 1). Returns (..., D) in [0, 1]; 0 for a zero direction.
    Scaling a query's features by one positive number changes no attention weight, so, as with the
    maximum in a safe softmax, no gradient is taken through the scale.
    """
    size = direction.abs()  # (..., D)
    tiny = torch.finfo(size.dtype).tiny
    largest = size.detach().amax(dim=-1, keepdim=True)  # (..., 1)
    ratio = size / largest.clamp_min(tiny)  # (..., D)
    return torch.exp2(power * torch.log2(ratio.clamp_min(tiny)))  # ratio^p, finite slope at 0


@checked(k="... D")
def key_magnitude(k: Tensor, lam: float = 3.0) -> Tensor:
    """Magnitude |k|^lam of a key's channels, Eq. (8): the key keeps its norm.

    k: (..., D). Returns (..., D), non-negative.
    """
    return k.abs().pow(lam)


# --- 3. Cosine mapping: non-negative without clipping --------------------------------------------


@checked(magnitude="... D", direction="... D")
def cosine_map(magnitude: Tensor, direction: Tensor, alpha: float = 20.0) -> Tensor:
    """Put each channel's sign into an angle, Eq. (9): [a cos(theta); a sin(theta)].

    magnitude, direction: (..., D). Returns (..., 2D) of the same norm as magnitude. The inner
    product of two such features is the sum of a_q a_k cos(theta_q - theta_k), Eq. (10). Angles span
    less than pi/2, so no term is negative: equal signs give cos(0) = 1, opposite ones almost
    cos(pi/2) = 0.

    We add pi/4 to every theta. Differences, and so inner products, stay what they were, but now the
    features themselves are non-negative: no sum of them cancels, and rounding makes no weight
    negative, whichever attention form adds them up.
    """
    turn = 2 * alpha * direction  # pi/4 * tanh(turn / 2) + pi/4 = pi/2 * sigmoid(turn)
    angles = (math.pi / 2) * torch.sigmoid(torch.stack([-turn, turn], dim=-2))  # (..., 2, D)
    # The first is pi/2 - theta: its sine is cos(theta), and exact where the cosine would round.
    return (magnitude.unsqueeze(-2) * angles.sin()).flatten(-2)  # (..., F)


@checked(magnitude="... D", direction="... D")
def sign_split(magnitude: Tensor, direction: Tensor) -> Tensor:
    """The limit of cosine_map as alpha grows, Eq. (11): one half a sign. Same inner products.

    magnitude, direction: (..., D). Returns (..., 2D).
    """
    return torch.cat([magnitude * (direction > 0), magnitude * (direction < 0)], dim=-1)  # (..., F)


# --- 4. Features: the three steps composed, and the baselines by name ----------------------------


@checked(q="... D", feature_map=FEATURE_MAPS, norm_scale="... 1")
def query_features(
    q: Tensor,
    feature_map: str = "cosine",
    *,
    lam: float = 3.0,
    tau: float = 0.5,
    alpha: float = 20.0,
    norm_scale: float | Tensor = 1.0,
) -> Tensor:
    """phi(q), Eqs. (2) -> (7) -> (9) or (11), up to one positive factor a query, Eq. (12).

    q: (..., D); float16 and bfloat16 are computed in float32, which is safe for norms of about
    1e-20 to 1e18. Returns (..., F) with F = 2D for "cosine" and "split", F = D for "elu" and
    "relu". Raises ValueError for another feature_map.
    """
    q = _at_least_float32(q)
    if feature_map in ("elu", "relu"):
        return _baseline_features(q, feature_map)
    norm, direction = decompose(q)  # (..., 1), (..., D)
    magnitude = query_magnitude(direction, query_power(norm, lam, tau, norm_scale))  # (..., D)
    return _signed_features(magnitude, direction, feature_map, alpha)


@checked(k="... D", feature_map=FEATURE_MAPS)
def key_features(
    k: Tensor, feature_map: str = "cosine", *, lam: float = 3.0, alpha: float = 20.0
) -> Tensor:
    """phi(k), Eqs. (2) -> (8) -> (9) or (11). Shapes, dtypes and errors as for query_features.

    No key is scaled by another, so no future key can leak into the past. In float32 its cube, times
    a value of about 1, is safe for entries of about 1e-12 to 1e12: below, a key counts as zero.
    """
    k = _at_least_float32(k)
    if feature_map in ("elu", "relu"):
        return _baseline_features(k, feature_map)
    _, direction = decompose(k)  # (..., 1), (..., D)
    return _signed_features(key_magnitude(k, lam), direction, feature_map, alpha)


def _signed_features(magnitude: Tensor, direction: Tensor, name: str, alpha: float) -> Tensor:
    if name == "cosine":
        return cosine_map(magnitude, direction, alpha)
    if name == "split":
        return sign_split(magnitude, direction)
    raise ValueError(f"feature_map={name!r} is not one of {FEATURE_MAPS}")


def _baseline_features(x: Tensor, name: str) -> Tensor:
    if name == "relu":
        return F.relu(x)
    below = x.masked_fill(x > 0, 0.0)
    return F.relu(x) + torch.exp(below)  # elu(x) + 1, without rounding to 0 at x = -17


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- 5. Attention forms: four ways to the same numbers -------------------------------------------
# Each returns, for every token t, the sum over visible keys i of (phi(q_t) . phi(k_i)) values_i.
# With values = [v 1] the last column is the normaliser of Eq. (5): one sum serves both.
# Where nobody asks for one of them, fast.py computes the same numbers in less time and memory.
# phi_q, phi_k: (B, H, N, F), values: (B, H, N, M + 1), state: (B, H, F, M + 1).


def _parallel(phi_q, phi_k, values):
    """Eq. (13), bidirectional: keys meet values first, so N x N never exists."""
    return phi_q @ (phi_k.mT @ values)  # (B, H, N, M + 1)


def _quadratic(phi_q, phi_k, values):
    """Eq. (13c), causal: the readable O(N^2) form that the linear ones are proved against."""
    return (phi_q @ phi_k.mT).tril() @ values  # (B, H, N, M + 1)


def _recurrent(phi_q, phi_k, values, state):
    """Eq. (14), causal: one token at a time, through a state of constant size."""
    totals = []
    for t in range(phi_q.shape[2]):
        q_t, k_t, value_t = (x[:, :, t : t + 1] for x in (phi_q, phi_k, values))
        state = state + k_t.mT @ value_t  # (B, H, F, M + 1)
        totals.append(q_t @ state)
    return torch.cat(totals, dim=2), state  # (B, H, N, M + 1), (B, H, F, M + 1)


def _chunked(phi_q, phi_k, values, state, chunk_size):
    """Eq. (15), causal: quadratic within a chunk, the state of Eq. (14) between chunks."""
    num_tokens = phi_q.shape[2]
    chunk_size = min(chunk_size, num_tokens)
    if padding := -num_tokens % chunk_size:  # zero features: a padded key adds nothing
        phi_q, phi_k, values = (F.pad(x, (0, 0, 0, padding)) for x in (phi_q, phi_k, values))
    q, k, values = (
        x.unflatten(2, (-1, chunk_size)) for x in (phi_q, phi_k, values)
    )  # (B, H, T, C, F), (B, H, T, C, F), (B, H, T, C, M + 1)
    sums = k.mT @ values  # (B, H, T, F, M + 1)
    states = torch.cat([state[:, :, None], sums], dim=2).cumsum(dim=2)  # (B, H, T + 1, F, M + 1)
    inter = q @ states[:, :, :-1]  # (B, H, T, C, M + 1)
    intra = (q @ k.mT).tril() @ values  # (B, H, T, C, M + 1)
    total = (inter + intra).flatten(2, 3)[:, :, :num_tokens]  # (B, H, N, M + 1)
    return total, states[:, :, -1]  # (B, H, N, M + 1), (B, H, F, M + 1)


def _attend(phi_q, phi_k, values, state, causal, mode, chunk_size):
    """Run the form that was asked for; those that keep no state return None for it."""
    if not causal:
        return _parallel(phi_q, phi_k, values), None
    if mode == "parallel":
        return _quadratic(phi_q, phi_k, values), None
    if state is None:  # nothing read yet: S and z of Eq. (14) are 0
        state = values.new_zeros(*phi_k.shape[:2], phi_k.shape[3], values.shape[3])
    if mode == "recurrent" or (mode == "auto" and phi_q.shape[2] == 1):
        return _recurrent(phi_q, phi_k, values, state)
    return _chunked(phi_q, phi_k, values, state, chunk_size or 64)


@checked(positions="N A real")
def rotary_angles(positions: Tensor, num_features: int) -> Tensor:
    """Angles that grow with position, for Eq. (17).

    positions: (N, A) along A axes, 1 for text and 2 for an image; the frequencies are shared out
    among the axes. Returns (N, num_features / 2). Raises ValueError if they cannot be shared out.
    """
    if num_features % (2 * positions.shape[1]):
        raise ValueError(
            f"{num_features} features are not divisible by 2 x {positions.shape[1]} axes"
        )
    count = num_features // (2 * positions.shape[1])
    frequencies = 10000.0 ** (-torch.arange(count, device=positions.device) / count)
    return (positions[:, :, None] * frequencies).flatten(1)


@checked(features="... N F", angles="N F/2")
def rotate(features: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (j, j + F/2) of features, for Eq. (17): theta of (9) grows by angles.

    features: (..., N, F), angles: (N, F / 2). Returns (..., N, F).
    """
    first, second = features.chunk(2, dim=-1)
    cos, sin = angles.cos().to(features.dtype), angles.sin().to(features.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _check_combination(q, causal, mode, feature_map, state, return_state):
    if mode in ("chunked", "recurrent") and not causal:
        raise ValueError(f"mode={mode!r} is causal: pass causal=True")
    if (state is not None or return_state) and (mode == "parallel" or not causal):
        raise ValueError("a state needs causal=True and a mode other than 'parallel'")
    num_features = q.shape[3] * (2 if feature_map in ("cosine", "split") else 1)
    if state is not None and state.shape[2] != num_features:
        raise ValueError(f"state must have F = {num_features} features: {tuple(state.shape)}")


@checked(
    q="B H N D",
    k="B H N D",
    v="B H N M",
    mode=MODES,
    feature_map=FEATURE_MAPS,
    key_mask="B N bool",
    state="B H F M+1",
    norm_scale="... 1 1",
    rope_positions="N A real",
)
def nala_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mode: str = "auto",
    feature_map: str = "cosine",
    lam: float = 3.0,
    tau: float = 0.5,
    alpha: float = 20.0,
    chunk_size: int | None = None,
    key_mask: Tensor | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
    norm_scale: float | Tensor = 1.0,
    rope_positions: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Norm-aware linear attention: Eq. (5) with the features of Eqs. (2) to (12).

    q, k: (B, H, N, D), v: (B, H, N, M), of a floating dtype; sums run in float32 at least.
    causal: token t sees tokens 0 ... t only.
    mode: "parallel" is Eq. (13), or Eq. (13c) if causal; "chunked" is Eq. (15) and "recurrent"
        Eq. (14), both causal. "auto" is for speed: recurrent for one causal token, else Eq. (13) or
        (15) as fast.py computes them, which can be differentiated once. With Eq. (17), and inside
        torch.compile and torch.func, it takes the forms of this file.
    feature_map: one of FEATURE_MAPS; lam, tau, alpha, norm_scale: see query_features; a norm_scale
        may differ between heads, (H, 1, 1), not between tokens or channels.
    chunk_size: tokens in a chunk, any positive number; None is 64, or with "auto" a number that
        balances the two parts of Eq. (15).
    key_mask: (B, N) bool, True for a real token; one that is False has no effect, if finite.
    state: (B, H, F, M + 1), returned by an earlier call: the sequence goes on from there.
    rope_positions: (N, A), see rotary_angles: rotates the numerator only, Eq. (17), after which
        weights may be negative and need not sum to 1.

    Returns (B, H, N, M) in v's dtype, and with return_state also the state after the last token.
    A row without mass, its query or all its visible keys zero or masked, gives output 0 and
    gradient 0. Infinity and NaN stay within their head and example, where they spread at least to
    their own token, but even to earlier ones. Raises TypeError and ValueError for arguments other
    than these.
    """
    _check_combination(q, causal, mode, feature_map, state, return_state)
    options = {"feature_map": feature_map, "lam": lam, "alpha": alpha}
    query = partial(query_features, tau=tau, norm_scale=norm_scale, **options)
    key = partial(key_features, **options)
    with torch.autocast(q.device.type, enabled=False):  # a bfloat16 sum of ones stops at 256
        one_step = causal and q.shape[2] == 1
        if mode == "auto" and rope_positions is None and not one_step and fast.applies(q):
            kernel = fast.Kernel(query, key, tau=tau, norm_scale=norm_scale, **options)
            out, after = fast.attention(q, k, v, kernel, causal, key_mask, state, chunk_size)
            return (out, after) if return_state else out
        phi_q, phi_k = query(q), key(k)  # (B, H, N, F), (B, H, N, F)
        if key_mask is not None:  # out of numerator and denominator alike
            phi_k = phi_k.masked_fill(~key_mask[:, None, :, None], 0.0)
        values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # (B, H, N, M + 1)
        values = _at_least_float32(values)
        attend = partial(_attend, causal=causal, mode=mode, chunk_size=chunk_size)
        total, after = attend(phi_q, phi_k, values, state)
        numerator, denominator = total[..., :-1], total[..., -1:]  # (B, H, N, M), (B, H, N, 1)
        if rope_positions is not None:  # Eq. (17): turn the numerator, leave the denominator
            angles = rotary_angles(rope_positions, phi_q.shape[-1])  # (N, F / 2)
            turned_q, turned_k = rotate(phi_q, angles), rotate(phi_k, angles)  # (B, H, N, F)
            total, turned = attend(turned_q, turned_k, values, state)
            numerator = total[..., :-1]  # (B, H, N, M)
            if turned is not None:
                after = torch.cat([turned[..., :-1], after[..., -1:]], dim=-1)  # (B, H, F, M + 1)
        # Without mass, divide by infinity: output 0, gradient 0.
        out = numerator / denominator.masked_fill(denominator == 0, math.inf)  # (B, H, N, M)
    out = out.to(v.dtype)
    return (out, after) if return_state else out


# --- 6. Softmax attention, and what is read off an attention --------------------------------------


@checked(q="B H N D", k="B H K D", v="B H K M", key_mask="B K bool", state=tuple)
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Softmax attention, Eq. (1), by PyTorch's fused kernel; arguments as in nala_attention.

    There may be another number K of keys than of queries. Its state is every key and value so far,
    (B, H, N, D) and (B, H, N, M): it grows with N.
    """
    if state is not None and key_mask is not None:
        raise ValueError("key_mask must be None with a state: it knows nothing of earlier keys")
    if state is not None:
        k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
    mask = None if key_mask is None else key_mask[:, None, None, :]  # (B, 1, 1, N)
    if causal and (state is not None or mask is not None):  # the kernel's own mask knows neither
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        visible = visible.tril(k.shape[2] - q.shape[2])  # token t sees the past and 0 ... t
        mask, causal = (visible if mask is None else visible & mask), False
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)  # (B, H, N, M)
    return (out, (k, v)) if return_state else out


@checked(
    q="B H N D",
    k="B H N D",
    feature_map=(*FEATURE_MAPS, "softmax"),
    key_mask="B N bool",
    norm_scale="... 1 1",
    rope_positions="N A real",
)
def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    feature_map: str = "cosine",
    key_mask: Tensor | None = None,
    **options: float | Tensor,
) -> Tensor:
    """The N x N weights that linear attention never forms, for plots and proofs.

    Attends to one-hot values: with unit vector i as the value of token i, the output is the
    weights, by the very code that a model runs. q, k: (B, H, N, D). feature_map: one of
    FEATURE_MAPS or "softmax"; options: lam, tau, alpha, norm_scale, rope_positions.
    Returns (B, H, N, N), rows summing to 1, or to 0 where a row has no mass.
    """
    one_hot = torch.eye(q.shape[2], dtype=q.dtype, device=q.device)  # (N, N)
    one_hot = one_hot.expand(*q.shape[:2], -1, -1)  # (B, H, N, N)
    masks = {"causal": causal, "key_mask": key_mask}
    if feature_map == "softmax":
        return softmax_attention(q, k, one_hot, **masks)
    return nala_attention(
        q, k, one_hot, mode="parallel", feature_map=feature_map, **masks, **options
    )


@checked(weights="... N")
def entropy(weights: Tensor) -> Tensor:
    """Positive sequence entropy, Eq. (3), in nats: the log of how many keys share the attention.

    weights: (..., N), non-negative; they need not sum to 1. Returns (...); 0 for a row of zeros.
    """
    total = weights.sum(dim=-1, keepdim=True)  # (..., 1)
    share = weights / total.masked_fill(total == 0, 1.0)  # (..., N)
    tiny = torch.finfo(share.dtype).tiny  # 0 log 0 = 0, with a finite slope
    return -(share * share.clamp_min(tiny).log()).sum(dim=-1)


# --- 7. The gated block ---------------------------------------------------------------------------

# Name of an attention in a model -> its feature map; softmax has none.
ATTENTIONS = {"nala": "cosine", "split": "split", "elu": "elu", "relu": "relu", "softmax": None}


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What both models' blocks need. Raises ValueError for what does not fit together."""

    num_layers: int = 4
    num_heads: int = 4
    dim: int = 128  # E
    conv_size: int  # W, of local(v)
    dropout: float = 0.0
    attention: str | Sequence[str] = "nala"  # in every block, or a name for each block
    rope: str | None = None  # "numerator": Eq. (17)
    norm_scale: float | None = 1.0  # of query_power; None: learned by each head, from sqrt(D)

    def __post_init__(self) -> None:
        check({n: x for n, x in vars(self).items() if (n, x) != ("norm_scale", None)})
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide dim={self.dim}")
        if len(self.attentions) != self.num_layers:
            raise ValueError(
                f"attention={self.attention!r} names {len(self.attentions)} blocks,"
                f" not num_layers={self.num_layers}"
            )
        if unknown := set(self.attentions) - ATTENTIONS.keys():
            raise ValueError(f"attention={unknown.pop()!r} is not one of {tuple(ATTENTIONS)}")
        if self.rope not in (None, "numerator"):
            raise ValueError(f"rope={self.rope!r} is neither None nor 'numerator'")
        if self.rope and "softmax" in self.attentions:
            raise ValueError("rope='numerator' is for linear attention, not for 'softmax'")

    @property
    def attentions(self) -> tuple[str, ...]:
        """The name of each block's attention, first to last."""
        one = isinstance(self.attention, str)
        return (self.attention,) * self.num_layers if one else tuple(self.attention)

    @property
    def kind(self) -> str:
        """What the model is: "linear", "softmax", or "hybrid" if only some blocks are linear."""
        linear = sum(name != "softmax" for name in self.attentions)
        return {0: "softmax", self.num_layers: "linear"}.get(linear, "hybrid")


@dataclass(frozen=True, kw_only=True)
class LMConfig(BlockConfig):
    """Sizes and choices of a NaLaLM."""

    vocab_size: int  # V
    conv_size: int = 4


@dataclass(frozen=True, kw_only=True)
class ViTConfig(BlockConfig):
    """Sizes and choices of a NaLaViT. The released backbone is a hybrid, linear attention in early
    blocks and softmax in late ones: attention=("split", "split", "softmax", "softmax")."""

    num_classes: int = 10  # Y
    conv_size: int = 5
    patch_size: int = 4  # P, pixels along a side of a patch: a power of 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size={self.patch_size} is not a power of 2")
        if self.dim % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide dim={self.dim}")
        if self.conv_size % 2 == 0:
            raise ValueError(f"conv_size={self.conv_size} is even: it has no middle")


class BlockState(NamedTuple):
    """What a block remembers of the tokens that it has read."""

    attention: Tensor | tuple[Tensor, Tensor] | None = None  # Eq. (14), or softmax's k and v
    conv: Tensor | None = None  # what the convolution still needs: the last W - 1 tokens
    position: int = 0  # number of tokens read


class CausalConv(nn.Module):
    """Depthwise convolution over the last W tokens: local(v) of Eq. (16) on text."""

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.past = size - 1
        self.conv = nn.Conv1d(dim, dim, size, groups=dim)

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """x: (B, N, E); before: (B, W - 1, E), the tokens before x. Returns (B, N, E) and the last
        W - 1 tokens."""
        if before is None:
            before = x.new_zeros(x.shape[0], self.past, x.shape[2])  # (B, W - 1, E)
        x = torch.cat([before, x], dim=1)  # (B, W - 1 + N, E)
        return self.conv(x.mT).mT, x[:, x.shape[1] - self.past :]  # (B, N, E), (B, W - 1, E)


class GridConv(nn.Module):
    """Depthwise convolution over W x W patches: local(v) of Eq. (16) on an image."""

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim)

    def forward(self, x: Tensor, before: None) -> tuple[Tensor, None]:
        """x: (B, R, S, E), which nothing comes before. Returns (B, R, S, E)."""
        return self.conv(x.movedim(-1, 1)).movedim(1, -1), before  # (B, R, S, E)


class GatedAttention(nn.Module):
    """y = W_o( LayerNorm(o + local(v)) * SiLU(W_g x) ), Eq. (16), for any attention o.

    Tokens of a text, (B, N, E), see the past. Patches of an image, (B, R, S, E), see one another.
    """

    def __init__(self, config: BlockConfig, attention: str):
        super().__init__()
        self.num_heads, self.rope = config.num_heads, config.rope
        self.causal = isinstance(config, LMConfig)
        self.feature_map = ATTENTIONS[attention]
        self.project = nn.Linear(config.dim, 4 * config.dim, bias=False)  # to q, k, v and gate
        self.local = (CausalConv if self.causal else GridConv)(config.dim, config.conv_size)
        self.norm = nn.LayerNorm(config.dim)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.norm_scale = config.norm_scale
        if config.norm_scale is None:
            root = math.sqrt(config.dim // config.num_heads)
            self.norm_scale = nn.Parameter(torch.full((config.num_heads,), root))  # (H,)

    def split_heads(self, x: Tensor) -> Tensor:
        """x: (B, N, E) or (B, R, S, E). Returns (B, H, N, D); patches count row by row."""
        x = x.flatten(1, -2).unflatten(-1, (self.num_heads, -1))  # (B, N, H, D)
        return x.transpose(1, 2)  # (B, H, N, D)

    def forward(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """x: (B, N, E), the tokens that follow state, or (B, R, S, E). Returns the same shape and
        the new state."""
        q, k, v, gate = self.project(x).chunk(4, dim=-1)  # (..., E)
        local, conv = self.local(v, state.conv)  # (..., E), (B, W - 1, E)
        q, k, v = (self.split_heads(y) for y in (q, k, v))  # (B, H, N, D)
        o, attention = self.attend(q, k, v, self.options(x, state), state.attention)
        o = o.transpose(1, 2).reshape(x.shape)  # (..., E)
        y = self.out(self.norm(o + local) * F.silu(gate))  # (..., E)
        return y, BlockState(attention, conv, state.position + x.shape[1])

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, options: dict, state: Tensor | tuple | None
    ) -> tuple[Tensor, Tensor | tuple | None]:
        """o of Eq. (16), (B, H, N, M), and the state to go on from, of a text."""
        past = {"causal": True, "state": state, "return_state": True} if self.causal else {}
        if self.feature_map is None:
            o = softmax_attention(q, k, v, **past)
        else:
            o = nala_attention(q, k, v, feature_map=self.feature_map, **options, **past)
        return o if self.causal else (o, None)

    def options(self, x: Tensor, state: BlockState) -> dict[str, float | Tensor | None]:
        """What this block asks of nala_attention for x: norm_scale, rope_positions."""
        scale, positions = self.norm_scale, None
        if isinstance(scale, nn.Parameter):
            scale = scale[:, None, None]  # (H, 1, 1)
        if self.rope:
            axes = [torch.arange(size, device=x.device) for size in x.shape[1:-1]]
            grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
            positions = state.position + grid.flatten(0, -2)  # (N, A)
        return {"norm_scale": scale, "rope_positions": positions}


class Block(nn.Module):
    """Pre-norm residual block: gated attention, then a two-layer perceptron."""

    def __init__(self, config: BlockConfig, attention: str):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.attention = GatedAttention(config, attention)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, 4 * config.dim), nn.GELU(), nn.Linear(4 * config.dim, config.dim)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """x: (B, N, E), the tokens that follow state, or (B, R, S, E). Returns the same shape and
        the new state."""
        y, state = self.attention(self.norm1(x), state)
        x = x + self.dropout(y)  # (..., E)
        return x + self.dropout(self.mlp(self.norm2(x))), state


def _initialise(model: NaLaLM | NaLaViT) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for block in model.blocks:  # 2 branches a block add up: keep the variance of their sum
        for branch_end in (block.attention.out, block.mlp[-1]):
            nn.init.normal_(branch_end.weight, std=0.02 / math.sqrt(2 * len(model.blocks)))


# --- 8. The language model ------------------------------------------------------------------------


class NaLaLM(nn.Module):
    """Decoder-only character model. Causality and the convolution tell it the order of tokens:
    there is no position embedding, and so no longest context."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, name) for name in config.attentions)
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        _initialise(self)

    @checked(tokens="B N token", state=Sequence)
    def forward(
        self, tokens: Tensor, state: Sequence[BlockState] | None = None
    ) -> tuple[Tensor, list[BlockState]]:
        """tokens: (B, N) integers, which follow those in state. Returns logits (B, N, V) over the V
        characters and the new state, one for each block: a sequence may be cut anywhere."""
        x = self.dropout(self.embed(tokens))  # (B, N, E)
        states = list(state) if state is not None else [BlockState()] * len(self.blocks)
        if len(states) != len(self.blocks):
            raise ValueError(f"state must be of {len(self.blocks)} blocks: {len(states)}")
        for i, block in enumerate(self.blocks):
            x, states[i] = block(x, states[i])
        return self.head(self.norm(x)), states

    @torch.no_grad()
    @checked(tokens="B N token")
    def generate(
        self,
        tokens: Tensor,
        num_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continue tokens (B, N), N >= 1, to (B, N + num_tokens): the prompt in one pass, then a
        token at a time through the state, at constant time and memory each (softmax: growing).

        temperature 0 takes the likeliest token; top_k draws among the k likeliest; seed fixes the
        draw, None leaves it to PyTorch's own generator.
        """
        was_training = self.training
        self.eval()
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        text, state = [tokens], None
        for _ in range(num_tokens):
            logits, state = self(text[-1], state)
            logits = logits[:, -1]  # (B, V)
            if top_k is not None:
                least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < least, -math.inf)  # (B, V)
            if temperature == 0:
                token = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                chances = F.softmax(logits / temperature, dim=-1)  # (B, V)
                token = torch.multinomial(chances, 1, generator=generator)  # (B, 1)
            text.append(token)
        self.train(was_training)
        return torch.cat(text, dim=1)


# --- 9. The image model ---------------------------------------------------------------------------


class NaLaViT(nn.Module):
    """Image classifier: a convolutional stem, gated blocks in which every patch sees every other,
    the mean over all patches. Convolutions, which see the zeros around the image, tell it where a
    patch is: there is no position embedding, and so an image may have any size."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        width = config.dim // config.patch_size
        layers = [nn.Conv2d(3, width, 3, padding=1)]
        while width < config.dim:  # half the size, twice the channels
            norm = nn.GroupNorm(1, width)  # of each image as a whole
            layers += [norm, nn.GELU(), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)]
            width *= 2
        self.stem = nn.Sequential(*layers)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, name) for name in config.attentions)
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.num_classes)
        _initialise(self)

    @checked(images="B 3 R S")
    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, height, width), of about zero mean and unit variance. Returns logits
        (B, Y) over the Y classes."""
        x = self.stem(images).movedim(1, -1)  # (B, R, S, E)
        x = self.dropout(x)
        for block in self.blocks:
            x, _ = block(x, BlockState())  # (B, R, S, E)
        return self.head(self.norm(x).mean(dim=(1, 2)))  # (B, Y)
