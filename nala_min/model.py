"""NaLaFormer in one file, to be read from top to bottom.

Softmax attention gets sharper as a query's norm grows. Linear attention with ReLU divides that norm
away and clips negative values. NaLa (arXiv 2506.21137) puts the norm back as the exponent of a
power kernel and maps directions through cosines: no weight is negative, and nothing is clipped.

The whole method, for one head. Equation numbers are this project's, not the paper's:

  (1)  softmax      o_t = sum_i w_ti v_i,  w_ti = exp(q_t . k_i / sqrt D) / sum_l exp(...)
  (2)  decompose    x = |x| d(x)                                   norm, direction
  (3)  entropy      PSE = -sum_i w_i log w_i                       how spread out weights are
  (4)  theorem      softmax: dPSE/d|q| <= 0, a longer query is sharper
  (5)  linear       o_t = phi(q_t) S / (phi(q_t) . z),  S = sum phi(k_i)^T v_i,  z = sum phi(k_i)
  (6)  theorem      homogeneous phi (ReLU): dPSE/d|q| = 0, the norm cancels in (5)
  (7)  query        p = lam (tau + tanh |q|),  a_q = |d(q)|^p      power, magnitude
  (8)  key          a_k = |k|^lam                                  a key keeps its norm
  (9)  cosine map   phi = [a cos theta; a sin theta],  theta = pi/4 tanh(alpha d) + pi/4
  (10) why          phi_q . phi_k = sum_j a_qj a_kj cos(theta_qj - theta_kj) >= 0,  |phi| = |a|
  (11) sign split   phi = [a where d > 0; a where d < 0], the limit alpha -> infinity of (9)
  (12) safe power   divide a_q by its largest channel; the factor cancels in (5)
  (13) parallel     phi(Q) (phi(K)^T [V 1]), then divide by the last column
  (13c) quadratic   tril(phi(Q) phi(K)^T) [V 1]
  (14) recurrent    S_t = S_{t-1} + phi(k_t)^T v_t,  z_t = z_{t-1} + phi(k_t)
  (15) chunked      (13c) within chunks of tokens, (14) between them
  (16) gated block  y = W_o( LayerNorm(o + local(v)) * SiLU(W_g x) )
  (17) rotary       rotate phi(q_t), phi(k_i) by position, in the numerator of (5) only

Shapes: B batch, H heads, N tokens, D channels per head, F features (2D; D for elu and relu),
M channels per value, T chunks of C tokens, E width of the model, W width of its convolution,
V characters in the vocabulary. Images: R rows of S patches (N = R S), Y classes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nala_min import fast  # the same results in less time, for mode="auto"

# --- 1. Decomposition and kernel: the query norm becomes an exponent ------------------------------


def decompose(x: Tensor) -> tuple[Tensor, Tensor]:
    """Norm (..., 1) and direction (..., D) of x (..., D), Eq. (2); both are 0 for a zero vector."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (..., 1)
    return norm, x / norm.masked_fill(norm == 0, 1.0)  # (..., 1), (..., D)


def query_power(norm: Tensor, lam=3.0, tau=0.5, norm_scale: float | Tensor = 1.0) -> Tensor:
    """Exponent that turns a query's norm (..., 1) into sharpness, Eq. (7). norm_scale is ours: the
    paper's tanh is flat beyond 2, but the norm of D unit-variance channels is about sqrt(D)."""
    return lam * (tau + torch.tanh(norm / norm_scale))  # (..., 1)


def query_magnitude(direction: Tensor, power: Tensor) -> Tensor:
    """|d|^p per channel, Eq. (7), with the largest scaled to 1, Eq. (12). (..., D) to (..., D).
    Scaling cancels in (5) and avoids underflow, like subtracting the maximum in a safe softmax."""
    size = direction.abs()  # (..., D)
    tiny = torch.finfo(size.dtype).tiny
    ratio = size / size.amax(dim=-1, keepdim=True).clamp_min(tiny)  # (..., D)
    return torch.exp2(power * torch.log2(ratio.clamp_min(tiny)))  # ratio^p, finite slope at 0


def key_magnitude(k: Tensor, lam=3.0) -> Tensor:
    """|k|^lam per channel, Eq. (8): a key keeps its norm. (..., D) to (..., D)."""
    return k.abs().pow(lam)  # (..., D)


# --- 2. Cosine mapping: non-negative without clipping ---------------------------------------------


def cosine_map(magnitude: Tensor, direction: Tensor, alpha=20.0) -> Tensor:
    """Encode each channel's sign as an angle, Eq. (9). Two (..., D) to (..., 2D).

    A channel adds a_q a_k cos(theta_q - theta_k) to phi_q . phi_k, Eq. (10): equal signs give
    cos(0) = 1, opposite signs cos(pi/2) = 0. The paper's angles lie in (-pi/4, pi/4). We shift them
    by pi/4: differences stay the same, no feature is negative, and no sum over keys cancels.
    """
    theta = (math.pi / 2) * torch.sigmoid(2 * alpha * direction)  # = pi/4 tanh(alpha d) + pi/4
    complement = (math.pi / 2) * torch.sigmoid(-2 * alpha * direction)  # = pi/2 - theta, accurate
    return torch.cat([magnitude * complement.sin(), magnitude * theta.sin()], dim=-1)  # cos, sin


def sign_split(magnitude: Tensor, direction: Tensor) -> Tensor:
    """Limit of cosine_map for large alpha, halves swapped, Eq. (11). Two (..., D) to (..., 2D)."""
    return torch.cat([magnitude * (direction > 0), magnitude * (direction < 0)], dim=-1)


# --- 3. Features: the steps composed, and two baselines -------------------------------------------


def query_features(
    q: Tensor, feature_map="cosine", *, lam=3.0, tau=0.5, alpha=20.0, norm_scale=1.0
) -> Tensor:
    """phi(q): Eqs. (2), (7), (12), then (9) for "cosine" or (11) for "split"; or the baseline "elu"
    or "relu". (..., D) to (..., F), in float32 or higher. Safe for norms from 1e-20 to 1e18."""
    q = at_least_float32(q)
    if feature_map in BASELINES:
        return BASELINES[feature_map](q)
    norm, direction = decompose(q)  # (..., 1), (..., D)
    magnitude = query_magnitude(direction, query_power(norm, lam, tau, norm_scale))  # (..., D)
    if feature_map == "split":
        return sign_split(magnitude, direction)
    return cosine_map(magnitude, direction, alpha)


def key_features(k: Tensor, feature_map="cosine", *, lam=3.0, alpha=20.0) -> Tensor:
    """phi(k): Eqs. (2), (8), then (9) or (11), as in query_features. Safe for entries from 1e-12 to
    1e12, since they are cubed. Scaling by the largest key would leak the future into the past."""
    k = at_least_float32(k)
    if feature_map in BASELINES:
        return BASELINES[feature_map](k)
    _, direction = decompose(k)  # (..., 1), (..., D)
    if feature_map == "split":
        return sign_split(key_magnitude(k, lam), direction)
    return cosine_map(key_magnitude(k, lam), direction, alpha)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # a bfloat16 sum of 1s stops at 256


# elu is elu(x) + 1, in a form that does not round to 0.
BASELINES = {"relu": F.relu, "elu": lambda x: F.relu(x) + x.masked_fill(x > 0, 0.0).exp()}

# --- 4. Attention: four forms of the same sums ----------------------------------------------------
# phi_q, phi_k: (B, H, N, F), values [v 1]: (B, H, N, M + 1), state [S z]: (B, H, F, M + 1). Each
# form returns, for every token t, the sum over visible keys i of (phi(q_t) . phi(k_i)) [v_i 1]. The
# last column is the normaliser of Eq. (5).


def parallel(phi_q, phi_k, values):
    """Eq. (13), every token sees every token: keys multiply values first: no N x N matrix."""
    return phi_q @ (phi_k.mT @ values)  # (B, H, N, M + 1)


def quadratic(phi_q, phi_k, values):
    """Eq. (13c), causal, O(N^2): the obvious form; tests compare the others with it."""
    return (phi_q @ phi_k.mT).tril() @ values  # (B, H, N, M + 1)


def recurrent(phi_q, phi_k, values, state):
    """Eq. (14), causal: one token at a time, through a state of constant size."""
    sums = []
    for q_t, k_t, v_t in zip(*(x.split(1, dim=2) for x in (phi_q, phi_k, values)), strict=True):
        state = state + k_t.mT @ v_t  # (B, H, F, M + 1)
        sums.append(q_t @ state)
    return torch.cat(sums, dim=2), state  # (B, H, N, M + 1), (B, H, F, M + 1)


def chunked(phi_q, phi_k, values, state, chunk_size=64):
    """Eq. (15), causal: quadratic within a chunk, the state of Eq. (14) between chunks."""
    num_tokens = phi_q.shape[2]
    num_chunks = -(-num_tokens // chunk_size)
    if padding := num_chunks * chunk_size - num_tokens:  # keys with zero features add nothing
        phi_q, phi_k, values = (F.pad(x, (0, 0, 0, padding)) for x in (phi_q, phi_k, values))
    q, k, v = (
        x.unflatten(2, (num_chunks, chunk_size)) for x in (phi_q, phi_k, values)
    )  # (B, H, T, C, F), (B, H, T, C, F), (B, H, T, C, M + 1)
    added = k.mT @ v  # (B, H, T, F, M + 1)
    states = torch.cat([state[:, :, None], added], dim=2).cumsum(dim=2)  # (B, H, T + 1, F, M + 1)
    inter = q @ states[:, :, :-1]  # from earlier chunks: (B, H, T, C, M + 1)
    intra = (q @ k.mT).tril() @ v  # from the same chunk: (B, H, T, C, M + 1)
    sums = (inter + intra).flatten(2, 3)[:, :, :num_tokens]  # (B, H, N, M + 1)
    return sums, states[:, :, -1]  # (B, H, N, M + 1), (B, H, F, M + 1)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, query_features: Callable, key_features: Callable, *,
    causal: bool = False, mode: str = "auto", chunk_size: int | None = None,
    key_mask: Tensor | None = None, state: Tensor | None = None, return_state: bool = False,
    rope_positions: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]:  # fmt: skip
    """Linear attention with any features, Eq. (5): o_t = phi(q_t) S / (phi(q_t) . z).

    q, k: (B, H, N, D), v: (B, H, N, M). Returns (B, H, N, M) in v's dtype; float32 or more inside.
    query_features, key_features: (..., D) to non-negative (..., F), each token independently.
    causal: token t sees only tokens 0 to t. key_mask: (B, N) bool, False for padding.
    mode: if causal, "quadratic" (or "parallel"), "recurrent" or "chunked" (chunk_size tokens each):
        all give the same results. "auto", the fastest, uses fast.py if that agrees with them.
    state: (B, H, F, M + 1), from an earlier call with return_state: continues its sequence.
    rope_positions: (N, A), see rotary_angles. Weights can then be negative and need not sum to 1.
    A row without mass gives 0: phi(q_t) is 0, or every visible key is masked or has phi(k_i) = 0.
    """
    if mode == "auto" and rope_positions is None:
        kwargs = {"causal": causal, "chunk_size": chunk_size, "key_mask": key_mask, "state": state}
        result = fast.attention(linear_attention, q, k, v, query_features, key_features, **kwargs)
        if result is not None:
            return result if return_state else result[0]

    def sums_of(phi_q, phi_k):  # sums by the form that mode selects, and the final state
        if not causal:
            return parallel(phi_q, phi_k, values), None
        if mode in ("quadratic", "parallel"):
            return quadratic(phi_q, phi_k, values), None
        if mode == "recurrent" or (mode == "auto" and q.shape[2] == 1):
            return recurrent(phi_q, phi_k, values, state)
        return chunked(phi_q, phi_k, values, state, chunk_size or 64)

    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        phi_q = query_features(at_least_float32(q))  # (B, H, N, F)
        phi_k = key_features(at_least_float32(k))  # (B, H, N, F)
        if key_mask is not None:  # excluded from numerator and normaliser
            phi_k = phi_k.masked_fill(~key_mask[:, None, :, None], 0.0)
        values = F.pad(at_least_float32(v), (0, 1), value=1.0)  # [v 1]: (B, H, N, M + 1)
        if causal and state is None:  # no token read yet
            state = values.new_zeros(*phi_k.shape[:2], phi_k.shape[3], values.shape[3])
        sums, new_state = sums_of(phi_q, phi_k)  # (B, H, N, M + 1), (B, H, F, M + 1)
        numerator, normaliser = sums[..., :-1], sums[..., -1:]  # (B, H, N, M), (B, H, N, 1)
        if rope_positions is not None:  # Eq. (17): rotate S, not z
            angles = rotary_angles(rope_positions, q.shape[-1], phi_q.dtype)  # (N, D / 2)
            sums, rotated = sums_of(rotate(phi_q, angles), rotate(phi_k, angles))
            numerator = sums[..., :-1]  # (B, H, N, M)
            if new_state is not None:  # rotated S, the same z
                new_state = torch.cat([rotated[..., :-1], new_state[..., -1:]], dim=-1)
        out = numerator / normaliser.masked_fill(normaliser == 0, math.inf)  # no mass: x / inf = 0
    return (out.to(v.dtype), new_state) if return_state else out.to(v.dtype)


def nala_attention(
    q, k, v, *, feature_map="cosine", lam=3.0, tau=0.5, alpha=20.0, norm_scale=1.0, **options
) -> Tensor | tuple[Tensor, Tensor | None]:
    """Norm-aware linear attention: Eq. (5) with the features of Eqs. (2) to (12). q, k, v and
    options: see linear_attention; the others: see query_features. norm_scale may be (H, 1, 1)."""
    common = {"feature_map": feature_map, "lam": lam, "alpha": alpha}
    query = partial(query_features, tau=tau, norm_scale=norm_scale, **common)
    return linear_attention(q, k, v, query, partial(key_features, **common), **options)


def rotary_angles(positions: Tensor, dim: int, dtype=torch.float32) -> Tensor:
    """Angles (N, dim / 2) for positions (N, A), Eq. (17). A is 1 for text and 2 for images, where
    rows rotate the first half of the channels and columns the second."""
    count = dim // (2 * positions.shape[1])  # frequencies per axis, from 1 to 1 / 10,000
    exponents = torch.arange(count, dtype=dtype, device=positions.device) / max(count - 1, 1)
    return (positions[:, :, None] * 10000.0**-exponents).flatten(1)  # (N, D / 2)


def rotate(features: Tensor, angles: Tensor) -> Tensor:
    """Rotate channels 2j, 2j+1 in each block of D of (..., N, F) by angles (N, D / 2), Eq. (17)."""
    first, second = features.unflatten(-1, (-1, angles.shape[1], 2)).unbind(-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (N, 1, D / 2)
    rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.flatten(-3).to(features.dtype)


# --- 5. Softmax for comparison, attention weights and their entropy -------------------------------


def softmax_attention(q, k, v, *, causal=False, key_mask=None, state=None, return_state=False):
    """Softmax attention, Eq. (1), with PyTorch's fused kernel. Arguments: see linear_attention, but
    k and v may have another number of tokens. The state, all keys and values, grows with N."""
    if state is not None:
        k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
    mask = None if key_mask is None else key_mask[:, None, None, :]  # (B, 1, 1, N)
    if causal and (mask is not None or q.shape[2] != k.shape[2]):  # else is_causal is enough
        visible = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        mask, causal = (visible if mask is None else visible & mask), False
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)  # (B, H, N, M)
    return (out, (k, v)) if return_state else out


def attention_weights(q: Tensor, k: Tensor, *, feature_map="cosine", **options) -> Tensor:
    """The N x N weights that linear attention never forms, (B, H, N, N), from the code that models
    run: if the value of token i is the unit vector i, the output is the weights. feature_map: as in
    nala_attention, or "softmax", or a function such as those in ATTENTIONS."""
    one_hot = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
    if not callable(feature_map):
        feature_map = ATTENTIONS[{"cosine": "nala"}.get(feature_map, feature_map)]
    return feature_map(q, k, one_hot, **options)


def entropy(weights: Tensor) -> Tensor:
    """Entropy of weights (..., N) in nats, Eq. (3): the log of the effective number of keys.
    Weights need not sum to 1. A row of zeros gives 0; 0 log 0 is 0, with a finite slope."""
    total = weights.sum(dim=-1, keepdim=True)  # (..., 1)
    probs = weights / total.masked_fill(total == 0, 1.0)  # (..., N)
    return -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(dim=-1)


# --- 6. The gated block ---------------------------------------------------------------------------

# The choices for --attention: functions (q, k, v, *, causal, state, return_state), or classes. A
# class is instantiated once per block, with the config, and may have parameters.
ATTENTIONS: dict[str, Callable] = {"nala": nala_attention, "softmax": softmax_attention} | {
    name: partial(nala_attention, feature_map=name) for name in ("split", "elu", "relu")
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and options of a model. vocab_size is for text, the last two are for images."""

    num_layers: int = 4
    num_heads: int = 4
    dim: int = 128  # E
    conv_size: int = 4  # W, of local(v); odd for images
    dropout: float = 0.0
    attention: str | Sequence[str] = "nala"  # from ATTENTIONS: one for all blocks, or one per block
    rope: str | None = None  # "numerator": Eq. (17)
    norm_scale: float | None = 1.0  # of query_power; None: learned per head, initially sqrt(D)
    vocab_size: int = 256  # V
    num_classes: int = 10  # Y
    patch_size: int = 4  # side of a patch in pixels: a power of 2

    @property
    def attentions(self) -> tuple[str, ...]:
        single = isinstance(self.attention, str)
        return (self.attention,) * self.num_layers if single else tuple(self.attention)


class BlockState(NamedTuple):
    """What a block remembers of the tokens read so far."""

    attention: Any = None  # state of its attention: [S z] of Eq. (14), or softmax's k and v
    conv: Tensor | None = None  # the last W - 1 tokens
    position: int = 0  # number of tokens read


class LocalConv(nn.Module):
    """local(v) of Eq. (16): depthwise convolution over W x W patches, or the last W tokens."""

    def __init__(self, dim: int, size: int, causal: bool):
        super().__init__()
        conv, padding = (nn.Conv1d, 0) if causal else (nn.Conv2d, size // 2)
        self.conv = conv(dim, dim, size, padding=padding, groups=dim)

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if x.ndim == 4:
            return self.conv(x.movedim(-1, 1)).movedim(1, -1), None  # (B, R, S, E)
        num_past = self.conv.kernel_size[0] - 1
        x = F.pad(x, (0, 0, num_past, 0)) if past is None else torch.cat([past, x], dim=1)
        return self.conv(x.mT).mT, x[:, x.shape[1] - num_past :]  # (B, N, E), (B, W - 1, E)


class GatedAttention(nn.Module):
    """y = W_o( LayerNorm(o + local(v)) * SiLU(W_g x) ), Eq. (16), for any attention o. x:
    (B, N, E) for text, causal; (B, R, S, E) for images, where every patch sees every other."""

    def __init__(self, config: Config, attention: str, causal: bool):
        super().__init__()
        self.num_heads, self.causal, self.rope = config.num_heads, causal, config.rope
        attend = ATTENTIONS[attention]
        self.attend = attend(config) if isinstance(attend, type) else attend
        self.project = nn.Linear(config.dim, 4 * config.dim, bias=False)  # to q, k, v and gate
        self.local = LocalConv(config.dim, config.conv_size, causal)
        self.norm = nn.LayerNorm(config.dim)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.norm_aware, self.norm_scale = attention in ("nala", "split"), config.norm_scale
        if self.norm_aware and config.norm_scale is None:
            root = math.sqrt(config.dim // config.num_heads)
            self.norm_scale = nn.Parameter(torch.full((config.num_heads,), root))

    def forward(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        q, k, v, gate = self.project(x).chunk(4, dim=-1)  # (..., E)
        local, conv = self.local(v, state.conv)  # (..., E), (B, W - 1, E)
        q, k, v = (self.split_heads(y) for y in (q, k, v))  # (B, H, N, D)
        kwargs = {"causal": self.causal, "state": state.attention, "return_state": True}
        o, new_state = self.attend(q, k, v, **kwargs, **self.options(x, state.position))
        o = o.transpose(1, 2).reshape(x.shape)  # (..., E)
        y = self.out(self.norm(o + local) * F.silu(gate))  # (..., E)
        return y, BlockState(new_state if self.causal else None, conv, state.position + x.shape[1])

    def split_heads(self, x: Tensor) -> Tensor:  # to (B, H, N, D); patches in row-major order
        return x.flatten(1, -2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def options(self, x: Tensor, position: int) -> dict[str, float | Tensor]:
        options, scale = {}, self.norm_scale  # arguments from the config
        if self.norm_aware:
            options["norm_scale"] = scale[:, None, None] if isinstance(scale, Tensor) else scale
        if self.rope:
            axes = [torch.arange(size, device=x.device) for size in x.shape[1:-1]]
            options["rope_positions"] = position + torch.cartesian_prod(*axes).view(-1, len(axes))
        return options


class Block(nn.Module):
    """Pre-norm residual block: gated attention, then a two-layer MLP."""

    def __init__(self, config: Config, attention: str, causal: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.attention = GatedAttention(config, attention, causal)
        widen, narrow = nn.Linear(config.dim, 4 * config.dim), nn.Linear(4 * config.dim, config.dim)
        self.mlp = nn.Sequential(widen, nn.GELU(), narrow)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        y, state = self.attention(self.norm1(x), state)  # (..., E)
        x = x + self.dropout(y)  # (..., E)
        return x + self.dropout(self.mlp(self.norm2(x))), state  # (..., E)


def initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for output in (x for block in model.blocks for x in (block.attention.out, block.mlp[-1])):
        nn.init.normal_(output.weight, std=0.02 / math.sqrt(2 * len(model.blocks)))  # as in GPT-2


@contextmanager
def in_mode(net: nn.Module, *, training: bool) -> Iterator[None]:
    """Put net into training or evaluation mode inside the block. Afterwards, even after an error,
    each module returns to its previous mode."""
    modes = [(module, module.training) for module in net.modules()]
    if not (training and net.training):  # frozen modules of a training net stay frozen
        net.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# --- 7. The two models ----------------------------------------------------------------------------


class NaLaLM(nn.Module):
    """Decoder-only character model. Causality and the convolution encode the order of tokens:
    there is no position embedding, so no context limit."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, name, causal=True) for name in config.attentions)
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        initialise(self)

    def forward(self, tokens: Tensor, state: Sequence[BlockState] | None = None):
        """Integer tokens (B, N), which follow those in state, to logits (B, N, V) and a new state:
        one BlockState per block. A sequence can be split anywhere."""
        states = list(state or [BlockState()] * len(self.blocks))
        x = self.dropout(self.embed(tokens))  # (B, N, E)
        for i, block in enumerate(self.blocks):
            x, states[i] = block(x, states[i])  # (B, N, E)
        return self.head(self.norm(x)), states  # (B, N, V)

    @torch.no_grad()
    def generate(self, tokens: Tensor, num_tokens: int, *, temperature=1.0, top_k=None, seed=None):
        """Extend tokens (B, N) to (B, N + num_tokens). Constant cost per token, unlike softmax.
        temperature=0 is greedy; seed=None uses PyTorch's global generator."""
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        text, state = [tokens], None
        with in_mode(self, training=False):
            for _ in range(num_tokens):
                logits, state = self(text[-1], state)
                logits = logits[:, -1]  # (B, V)
                if top_k is not None:
                    kept, index = logits.topk(min(top_k, logits.shape[1]))
                    logits = torch.full_like(logits, -math.inf).scatter(1, index, kept)  # (B, V)
                if temperature == 0:
                    text.append(logits.argmax(dim=-1, keepdim=True))
                else:
                    probs = F.softmax((logits - logits.amax(1, keepdim=True)) / temperature, dim=1)
                    text.append(torch.multinomial(probs, 1, generator=generator))
        return torch.cat(text, dim=1)


class NaLaViT(nn.Module):
    """Image classifier: convolutional stem, blocks, mean pooling. Zero padding in the convolutions
    encodes position: there is no position embedding, and any image size works."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width, halvings = (config.dim + 1) // 2, config.patch_size.bit_length() - 1
        layers = [nn.Conv2d(3, width, 3, padding=1)]
        for stride in (2, 1) * halvings or (1,):  # two convolutions per halving
            norm = nn.GroupNorm(1, width)  # over each whole image
            layers += [norm, nn.GELU(), nn.Conv2d(width, config.dim, 3, stride, padding=1)]
            width = config.dim
        self.stem = nn.Sequential(*layers)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, name, causal=False) for name in config.attentions)
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, height, width), of about zero mean and unit variance, to logits (B, Y)."""
        x = self.dropout(self.stem(images).movedim(1, -1))  # (B, R, S, E)
        for block in self.blocks:
            x, _ = block(x, BlockState())  # (B, R, S, E)
        return self.head(self.norm(x).mean(dim=(1, 2)))  # (B, Y)
