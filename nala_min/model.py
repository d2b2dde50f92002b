"""NaLaFormer in one file, to be read from top to bottom.

Softmax attention gets sharper as a query's norm grows. Linear attention with ReLU divides that norm
away and clips negative values. NaLa (arXiv 2506.21137) puts the norm back as the exponent of a
power kernel and maps directions through cosines: no weight is negative, and nothing is clipped.

The whole method for one head. Numbers are this project's, not the paper's; (17) is in relatives.py:

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

Shapes: B batch, H heads, N tokens, K keys (N if causal), D channels per head, F features (2D; D for
elu and relu), M channels per value, T chunks of C tokens, E width of the model, W width of its
convolution, V characters in the vocabulary. Images: R rows of P patches (N = R P), Y classes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nala_min import fast  # the same results in less time, for mode="auto"

# --- 1. Decomposition and kernel: the query norm becomes an exponent ------------------------------


def decompose(x: Tensor) -> tuple[Tensor, Tensor]:
    """Norm (..., 1) and direction (..., D) of x (..., D), Eq. (2); both are 0 for a zero vector."""
    x = at_least_float32(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (..., 1)
    return norm, x / norm.masked_fill(norm == 0, 1.0)  # (..., 1), (..., D)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # half sums overflow, or stop at 256


def query_power(norm: Tensor, lam=3.0, tau=0.5) -> Tensor:
    """Exponent that turns a query's norm (..., 1) into sharpness, Eq. (7). Flat beyond 2."""
    return lam * (tau + torch.tanh(norm))  # (..., 1)


def query_magnitude(direction: Tensor, power: Tensor) -> Tensor:
    """|d|^p per channel, Eq. (7), with the largest scaled to 1, Eq. (12). (..., D) to (..., D).
    Scaling cancels in (5) and avoids underflow, like subtracting the maximum in a safe softmax."""
    size = at_least_float32(direction).abs()  # (..., D)
    tiny = torch.finfo(size.dtype).tiny
    ratio = size / size.amax(dim=-1, keepdim=True).clamp_min(tiny)  # (..., D)
    return torch.exp2(power * torch.log2(ratio.clamp_min(tiny)))  # ratio^p, finite slope at 0


def key_magnitude(k: Tensor, lam=3.0) -> Tensor:
    """|k|^lam per channel, Eq. (8): a key keeps its norm. (..., D) to (..., D)."""
    size = at_least_float32(k).abs()  # (..., D)
    return torch.where(k == 0, 0.0, size.clamp_min(torch.finfo(size.dtype).tiny).pow(lam))


# --- 2. Cosine mapping: non-negative without clipping ---------------------------------------------


def cosine_map(magnitude: Tensor, direction: Tensor, alpha=20.0) -> Tensor:
    """Encode each channel's sign as an angle, Eq. (9). Two (..., D) to (..., 2D).
    A channel adds a_q a_k cos(theta_q - theta_k) to phi_q . phi_k, Eq. (10): equal signs give
    cos(0) = 1, opposite signs cos(pi/2) = 0. We shift the paper's angles by pi/4: differences stay
    the same, no feature is negative, and no sum over keys cancels. pi/4 tanh(x) + pi/4 equals
    pi/2 sigmoid(2x), and cos(theta) is accurate near 0 if computed as sin(pi/2 - theta)."""
    sin = torch.sin((math.pi / 2) * torch.sigmoid(2 * alpha * direction))  # sin(theta)
    cos = torch.sin((math.pi / 2) * torch.sigmoid(-2 * alpha * direction))  # sin(pi/2 - theta)
    return torch.cat([magnitude * cos, magnitude * sin], dim=-1)


def sign_split(magnitude: Tensor, direction: Tensor) -> Tensor:
    """Limit of cosine_map for large alpha, halves swapped, Eq. (11). Two (..., D) to (..., 2D)."""
    return torch.cat([magnitude * (direction > 0), magnitude * (direction < 0)], dim=-1)


# --- 3. Features: the steps composed, and two baselines -------------------------------------------


def query_features(q: Tensor, feature_map="cosine", *, lam=3.0, tau=0.5, alpha=20.0) -> Tensor:
    """phi(q): Eqs. (2), (7), (12), then (9) for "cosine" or (11) for "split"; or the baseline "elu"
    or "relu". (..., D) to (..., F), in float32 or higher. Safe for norms from 1e-20 to 1e18."""
    check_features(feature_map, lam=lam, tau=tau, alpha=alpha)
    if feature_map in BASELINES:
        return BASELINES[feature_map](at_least_float32(q))
    norm, direction = decompose(q)  # (..., 1), (..., D)
    magnitude = query_magnitude(direction, query_power(norm, lam, tau))  # (..., D)
    if feature_map == "split":
        return sign_split(magnitude, direction)
    return cosine_map(magnitude, direction, alpha)


def key_features(k: Tensor, feature_map="cosine", *, lam=3.0, alpha=20.0) -> Tensor:
    """phi(k): Eqs. (2), (8), then (9) or (11), as in query_features. Safe for entries from 1e-12 to
    1e12, since they are cubed. Scaling by the largest key would leak the future into the past."""
    check_features(feature_map, lam=lam, alpha=alpha)
    if feature_map in BASELINES:
        return BASELINES[feature_map](at_least_float32(k))
    _, direction = decompose(k)  # (..., 1), (..., D)
    if feature_map == "split":
        return sign_split(key_magnitude(k, lam), direction)
    return cosine_map(key_magnitude(k, lam), direction, alpha)


# elu is elu(x) + 1, in a form that does not round to 0.
BASELINES = {"relu": F.relu, "elu": lambda x: F.relu(x) + x.masked_fill(x > 0, 0.0).exp()}

# --- 4. Attention: four forms of the same sums ----------------------------------------------------
# phi_q, phi_k: (B, H, N, F), values [v 1]: (B, H, N, M + 1), state [S z]: (B, H, F, M + 1). Each
# form sums (phi(q_t) . phi(k_i)) [v_i 1] over the keys that t sees; the last column normalises (5).


def parallel(phi_q, phi_k, values, state=0.0):
    """Eq. (13), every token sees every token: keys multiply values first: no N x N matrix."""
    state = state + phi_k.mT @ values  # (B, H, F, M + 1)
    return phi_q @ state, state  # (B, H, N, M + 1), (B, H, F, M + 1)


def quadratic(phi_q, phi_k, values):
    """Eq. (13c), causal, O(N^2): the obvious form; tests compare the others with it."""
    return (phi_q @ phi_k.mT).tril() @ values  # (..., M + 1)


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
    num_chunks = 1 if torch.compiler.is_compiling() else -(-num_tokens // chunk_size)
    while num_chunks * chunk_size < num_tokens:  # powers of 2: few graphs for many lengths
        num_chunks *= 2
    if padding := num_chunks * chunk_size - num_tokens:  # keys with zero features add nothing
        phi_q, phi_k, values = (F.pad(x, (0, 0, 0, padding)) for x in (phi_q, phi_k, values))
    q, k, v = (x.unflatten(2, (num_chunks, -1)) for x in (phi_q, phi_k, values))
    *states, state = accumulate((k.mT @ v).unbind(2), initial=state)  # before each chunk, and last
    sums = q @ torch.stack(states, dim=2) + quadratic(q, k, v)  # (B, H, T, C, M + 1)
    return sums.flatten(2, 3)[:, :, :num_tokens], state  # (B, H, N, M + 1), (B, H, F, M + 1)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, query_map: Callable, key_map: Callable, *,
    causal: bool = False, mode: str = "auto", chunk_size: int | None = None,
    key_mask: Tensor | None = None, state: Tensor | None = None, return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor | None]:  # fmt: skip
    """Linear attention with any features, Eq. (5): o_t = phi(q_t) S / (phi(q_t) . z).
    q: (B, H, N, D), k: (B, H, K, D), v: (B, H, K, M). Returns (B, H, N, M) in v's dtype; float32 or
    more inside. A row without mass gives 0: phi(q_t), or phi(k_i) of every visible key, is 0.
    query_map, key_map: the features, (..., D) to non-negative (..., F), each token by itself.
    causal: token t sees only tokens 0 to t, and K is N. key_mask: (B, K) bool, False for padding.
    mode: if causal, "quadratic" (or "parallel"), "recurrent" or "chunked" (chunk_size tokens each):
        all give the same results. "auto" is the fastest: for the paper's features, fast.py.
    state: (B, H, F, M + 1), from an earlier call with return_state: continues its sequence.
    """
    check_inputs(q, k, v, causal, key_mask, mode, chunk_size)
    check_tensor("k", k, q.shape if causal else k.shape, q)
    inputs = q, k, v, query_map, key_map, causal, chunk_size, key_mask, state
    if mode == "auto" and (result := fast.attention(linear_attention, *inputs)) is not None:
        return result if return_state else result[0]

    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        if key_mask is not None:  # before any product: 0 * NaN = NaN
            masked = ~key_mask[:, None, :, None]  # (B, 1, K, 1)
            k, v = k.masked_fill(masked, 0.0), v.masked_fill(masked, 0.0)
        phi_q = query_map(at_least_float32(q))  # (B, H, N, F)
        phi_k = key_map(at_least_float32(k))  # (B, H, K, F)
        if key_mask is not None:  # phi(0) may be positive
            phi_k = phi_k.masked_fill(masked, 0.0)
        values = F.pad(at_least_float32(v), (0, 1), value=1.0)  # [v 1]: (B, H, K, M + 1)
        shape = *phi_k.shape[:2], phi_k.shape[3], values.shape[3]  # B, H, F, M + 1
        state = values.new_zeros(shape) if state is None else state  # no token read yet
        check_tensor("state", state, shape, values)
        if not causal:
            sums, state = parallel(phi_q, phi_k, values, state)
        elif mode == "recurrent" or (mode == "auto" and q.shape[2] == 1):
            sums, state = recurrent(phi_q, phi_k, values, state)
        else:
            size = q.shape[2] if mode in ("quadratic", "parallel") else chunk_size or 64
            sums, state = chunked(phi_q, phi_k, values, state, size)
        numerator, normaliser = sums.split([v.shape[3], 1], dim=-1)  # (B, H, N, M), (B, H, N, 1)
        out = numerator / normaliser.masked_fill(normaliser == 0, math.inf)  # no mass: x / inf = 0
    return (out.to(v.dtype), state) if return_state else out.to(v.dtype)


def nala_attention(q, k, v, *, feature_map="cosine", lam=3.0, tau=0.5, alpha=20.0, **options):
    """Norm-aware linear attention: Eq. (5) with the features of Eqs. (2) to (12). q, k, v and
    options: see linear_attention; the others: see query_features."""
    for name in {"is_causal", "attn_mask", "key_padding_mask"} & options.keys():
        require(False, name, "called causal, or key_mask (True: visible)", options[name])
    query_map = partial(query_features, feature_map=feature_map, lam=lam, tau=tau, alpha=alpha)
    key_map = partial(key_features, feature_map=feature_map, lam=lam, alpha=alpha)
    return linear_attention(q, k, v, query_map, key_map, **options)


# --- 5. Softmax for comparison, attention weights and their entropy -------------------------------


def softmax_attention(q, k, v, *, causal=False, key_mask=None, state=None, return_state=False):
    """Softmax attention, Eq. (1), with PyTorch's fused kernel. Arguments: see linear_attention. The
    state, all keys and values, grows with N. With fewer queries than keys, they are the last."""
    check_inputs(q, k, v, causal, key_mask)
    require(state is None or key_mask is None, "key_mask", "None with a state", key_mask)
    if state is not None or return_state:  # a copy: a view would hold all that it is a part of
        past = (k[:, :, :0], v[:, :, :0]) if state is None else state
        for x, y in zip(past, (k, v), strict=True):
            check_tensor("state", x, (*y.shape[:2], past[0].shape[2], y.shape[3]), y)
        k, v = (torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True))
    N, K, mask = q.shape[2], k.shape[2], None
    require(N <= K or not causal, "k", f"of at least {N} tokens, like q, if causal", k)
    if key_mask is not None:
        mask = key_mask[:, None, None, :]  # (B, 1, 1, K)
        k, v = (x.masked_fill(~mask.mT, 0.0) for x in (k, v))  # 0 * NaN would be NaN
    if causal and (mask is not None or N != K):
        visible = q.new_ones(N, K, dtype=torch.bool).tril(K - N)
        mask = visible if mask is None else visible & mask
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None)
    return (out, (k, v)) if return_state else out


def attention_weights(q: Tensor, k: Tensor, attention="nala", **options) -> Tensor:
    """The weights that linear attention never forms, (B, H, N, K): if the value of token i is the
    unit vector i, the output is the weights. attention: a name in ATTENTIONS, or a function."""
    attention = ATTENTIONS.get(attention, attention)
    require(callable(attention), "attention", f"one of {', '.join(ATTENTIONS)}", attention)
    one_hot = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
    return attention(q, k, one_hot, **options)


def entropy(weights: Tensor) -> Tensor:
    """Entropy of weights (..., K) in nats, Eq. (3): the log of the effective number of keys.
    Weights need not sum to 1. A row of zeros gives 0; 0 log 0 is 0, with a finite slope."""
    total = at_least_float32(weights).sum(dim=-1, keepdim=True)  # (..., 1)
    probs = weights / total.masked_fill(total == 0, 1.0)  # (..., K)
    return -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(dim=-1)


# --- 6. The gated block ---------------------------------------------------------------------------

# The choices for --attention: functions (q, k, v, *, causal, state, return_state), or classes, made
# once per block with the config. With takes_input, they get the block's input x (B, N, E) as well.
ATTENTIONS: dict[str, Callable] = {"nala": nala_attention, "softmax": softmax_attention} | {
    name: partial(nala_attention, feature_map=name) for name in ("split", "elu", "relu")
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and options of a model. Raises ValueError for a wrong one."""

    num_layers: int = 4
    num_heads: int = 4
    dim: int = 128  # E
    conv_size: int | None = None  # W, of local(v): by default 4 for text, 5 for images
    dropout: float = 0.0
    attention: str | Sequence[str] = "nala"  # from ATTENTIONS: one for all blocks, or one per block
    vocab_size: int = 256  # V, of texts
    num_classes: int = 10  # Y, of images
    patch_size: int = 4  # side of an image's patch in pixels: a power of 2

    def __post_init__(self):
        for name, x in vars(self).items():
            is_size = name not in ("dropout", "attention") and (name, x) != ("conv_size", None)
            require(not is_size or (type(x) is int and x > 0), name, "a positive integer", x)
        require(0 <= self.dropout < 1, "dropout", "at least 0 and below 1", self.dropout)
        require(self.dim % self.num_heads == 0, "dim", f"divisible by {self.num_heads}", self.dim)
        ok = set(self.attentions) <= {*ATTENTIONS} and len(self.attentions) == self.num_layers
        require(ok, "attention", f"1 or {self.num_layers} of {[*ATTENTIONS]}", self.attention)

    @property
    def attentions(self) -> tuple[str, ...]:
        single = isinstance(self.attention, str)
        return (self.attention,) * self.num_layers if single else tuple(self.attention)


class LocalConv(nn.Module):
    """local(v) of Eq. (16): depthwise convolution over W x W patches, or the last W tokens."""

    def __init__(self, dim: int, size: int, causal: bool):
        super().__init__()
        conv, padding = (nn.Conv1d, 0) if causal else (nn.Conv2d, size // 2)
        self.conv = conv(dim, dim, size, padding=padding, groups=dim)

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if x.ndim == 4:
            return self.conv(x.movedim(-1, 1)).movedim(1, -1), None  # (B, R, P, E)
        num_past = self.conv.kernel_size[0] - 1
        if past is not None:
            check_tensor("state", past, (len(x), num_past, x.shape[2]), x)
        x = F.pad(x, (0, 0, num_past, 0)) if past is None else torch.cat([past, x], dim=1)
        return self.conv(x.mT).mT, x[:, x.shape[1] - num_past :].clone()  # (B, N, E), (B, W - 1, E)


class GatedAttention(nn.Module):
    """y = W_o( LayerNorm(o + local(v)) * SiLU(W_g x) ), Eq. (16). x: (B, N, E) or (B, R, P, E)."""

    def __init__(self, config: Config, attention: str, causal: bool):
        super().__init__()
        self.num_heads, self.causal = config.num_heads, causal
        attend = ATTENTIONS[attention]
        self.attend = attend(config) if isinstance(attend, type) else attend
        self.project = nn.Linear(config.dim, 4 * config.dim, bias=False)  # to q, k, v and gate
        self.local = LocalConv(config.dim, config.conv_size or (4 if causal else 5), causal)
        self.norm = nn.LayerNorm(config.dim)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        q, k, v, gate = self.project(x).chunk(4, dim=-1)  # (..., E)
        local, past_v = self.local(v, state[1])  # (..., E), (B, W - 1, E)
        q, k, v = (self.split_heads(y) for y in (q, k, v))  # (B, H, N, D)
        own = {"x": x.flatten(1, -2)} if getattr(self.attend, "takes_input", False) else {}
        o, past = self.attend(q, k, v, causal=self.causal, state=state[0], return_state=True, **own)
        o = o.transpose(1, 2).reshape(x.shape)  # (..., E)
        return self.out(self.norm(o + local) * F.silu(gate)), (past, past_v)  # (..., E)

    def split_heads(self, x: Tensor) -> Tensor:  # to (B, H, N, D); patches in row-major order
        return x.flatten(1, -2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm residual block: gated attention, then a two-layer MLP."""

    def __init__(self, config: Config, attention: str, causal: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.attention = GatedAttention(config, attention, causal)
        widen, narrow = nn.Linear(config.dim, 4 * config.dim), nn.Linear(4 * config.dim, config.dim)
        self.mlp = nn.Sequential(widen, nn.GELU(), narrow)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state: tuple) -> tuple[Tensor, tuple]:
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
    """Training or evaluation mode inside the block; afterwards, each module is as it was before."""
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
    """Character model. No position embedding: causality and the convolution encode the order."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, name, causal=True) for name in config.attentions)
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        initialise(self)

    def forward(self, tokens: Tensor, state: Sequence[tuple] | None = None):
        """Integer tokens (B, N), which follow those in state, to logits (B, N, V) and a new state:
        one per block. A sequence can be split anywhere."""
        check_tensor("tokens", tokens, (None, None), self.norm.weight, (torch.int64, torch.int32))
        states = [(None, None)] * len(self.blocks) if state is None else list(state)
        require(len(states) == len(self.blocks), "state", "one per block", len(states))
        x = self.dropout(self.embed(tokens))  # (B, N, E)
        for i, block in enumerate(self.blocks):
            x, states[i] = block(x, states[i])  # (B, N, E)
        return self.head(self.norm(x)), states  # (B, N, V)

    @torch.no_grad()
    def generate(self, tokens: Tensor, num_tokens: int, *, temperature=1.0, top_k=None, seed=None):
        """Extend tokens (B, N) to (B, N + num_tokens). Constant cost per token, unlike softmax.
        temperature=0 is greedy; seed=None uses PyTorch's global generator."""
        require(0 <= temperature < math.inf, "temperature", "at least 0 and finite", temperature)
        require(top_k is None or top_k > 0, "top_k", "positive", top_k)
        require(num_tokens >= 0, "num_tokens", "at least 0", num_tokens)
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(int(seed))
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
    """Image classifier. No position embedding: zero padding encodes position, at any image size."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, patch = config, config.patch_size
        require(patch & (patch - 1) == 0, "patch_size", "a power of 2", patch)
        require((config.conv_size or 5) % 2, "conv_size", "odd for images", config.conv_size)
        width, halvings = (config.dim + 1) // 2, patch.bit_length() - 1
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
        check_tensor("images", images, (None, 3, None, None), self.norm.weight)
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            [len(range(side)) for side in images.shape[2:]]  # a graph per size: PyTorch #172204
        x = self.dropout(self.stem(images).movedim(1, -1))  # (B, R, P, E)
        for block in self.blocks:
            x, _ = block(x, (None, None))  # (B, R, P, E)
        return self.head(self.norm(x).mean(dim=(1, 2)))  # (B, Y)


# --- 8. Checks: a mistake gets one line -----------------------------------------------------------


def require(condition: Any, name: str, must_be: str, got: Any) -> None:
    if not condition:
        if isinstance(got, Tensor) and got.numel() != 1:
            got = f"{got.dtype} {tuple(got.shape)} on {got.device}"
        raise ValueError(f"{name} must be {must_be}, got {' '.join(str(got).split()):.200}")


def check_features(feature_map: str, **numbers: float | Tensor) -> None:
    maps = ("cosine", "split", *BASELINES)
    require(feature_map in maps, "feature_map", f"one of {', '.join(maps)}", feature_map)
    for name, x in numbers.items():  # a tensor may be learned
        is_valid = isinstance(x, Tensor) or 0 < x < math.inf or (name, x) == ("tau", 0)
        require(is_valid, name, "positive and finite", x)


def check_tensor(name: str, x: Any, shape: tuple, like: Tensor, dtypes: tuple = ()) -> None:
    """x must have this shape (None: any size), like's device and precision, or one of dtypes."""
    if torch.compiler.is_compiling():  # a check would become a guard, and a new graph
        return
    lower = torch.float32, torch.bfloat16, torch.float16
    dtypes = dtypes or ((torch.float64,) if like.dtype == torch.float64 else lower)
    fits = isinstance(x, Tensor) and x.ndim == len(shape) and x.device == like.device
    fits = fits and all(n in (None, m) for n, m in zip(shape, x.shape, strict=True))
    require(fits and x.dtype in dtypes, name, f"a {dtypes[0]} {shape} on {like.device}", x)


def check_inputs(q, k, v, causal, key_mask, mode="auto", size=None) -> None:
    check_tensor("q", q, (None,) * 4, q if isinstance(q, Tensor) else torch.empty(()))
    check_tensor("k", k, (*q.shape[:2], None, q.shape[3]), q)
    check_tensor("v", v, (*k.shape[:3], None), q)
    if key_mask is not None:
        check_tensor("key_mask", key_mask, (len(k), k.shape[2]), q, (torch.bool,))
    require(isinstance(causal, bool), "causal", "True or False", causal)
    modes = ("auto", "parallel", "quadratic", "chunked", "recurrent")[: 5 if causal else 2]
    require(mode in modes, "mode", f"one of {', '.join(modes)} if causal={causal}", mode)
    require(size is None or (isinstance(size, int) and size > 0), "chunk_size", "positive", size)
