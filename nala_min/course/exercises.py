"""The checkers of the exercises, lesson by lesson.

The checker of an exercise is a function check_<name> below @exercise(hints). It looks for
known mistakes first (shape, sign, mask) and compares numbers with model.py's last.
"""

import math
import zlib
from collections.abc import Callable
from functools import wraps
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nala_min import model
from nala_min.course.diagnose import (
    Wrong, assert_close, assert_gradients_close, call, check_independence, check_weights, close,
    features, gradients, output, random_normal, valid_tensor,
)  # fmt: skip
from nala_min.measure import Recorder

LESSONS: dict[int | str, tuple[str, ...]] = {
    1: ("entropy", "softmax_weights", "entropy_slope"),
    2: ("linear_attention", "norm_microscope", "dropped_share"),
    3: ("query_magnitude", "power_slope", "counterexample"),
    4: ("cosine_features", "sign_split"),
    5: ("recurrent_step", "chunked_attention"),
    6: ("interference", "own_features"),
    7: ("decay_step", "delta_step"),
    "find_the_bug": ("attention_a", "attention_b", "attention_c"),
}
EXERCISES: dict[str, Callable] = {}  # {name: checker}
HINTS: dict[str, list[str]] = {}  # {name: hints, from gentle to almost the answer}


def exercise(hints: str, name: str = "") -> Callable:
    """Register the decorated checker, check_<name>. hints: one per line."""

    def register(check: Callable) -> Callable:
        exercise = name or check.__name__.removeprefix("check_")
        EXERCISES[exercise], HINTS[exercise] = check, hints.splitlines()
        return check

    return register


@exercise("""What does (3) do with weights that do not sum to 1, and with a weight of 0?
Divide by the sum over the last axis; then sum -share * log(share) over that axis.
0 * log(0) is NaN in floating point: in the logarithm only, replace a share of 0 by 1.""")
def check_entropy(student):
    weights = features(2, 3, 5)
    shares = weights / weights.sum(dim=-1, keepdim=True)
    got, expected = output(student, shares, shape=(2, 3)), model.entropy(shares)
    if (got < 0).any():
        raise Wrong("An entropy is negative: Eq. (3) begins with a minus sign.")
    mistakes = {"It is in bits: take the natural logarithm.": expected / math.log(2)}
    assert_close(got, expected, "The entropy", mistakes)
    if not close(output(student, weights, shape=(2, 3)), got):
        raise Wrong("Weights that do not sum to 1 change the entropy: divide by their sum first.")
    for scale in (1e-20, 1e6):
        if not close(output(student, scale * weights, shape=(2, 3)), got):
            raise Wrong(f"Weights times {scale:g} change the entropy: use no eps and no clamp.")
    zeros, case = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]).double(), " (weights of 0)"
    got = output(student, zeros, shape=(2,), case=case)
    assert_close(got, model.entropy(zeros), f"The entropy{case}")
    gradients(student, zeros, case=case)


@exercise("""Scores first: one matrix product gives q_t . k_i for every pair, (B, H, N, N).
Divide by the square root of D. Which axis of the scores runs over keys?
If causal, set the scores above the diagonal to -inf before the softmax, not to 0 after it.
exp overflows: mask with -inf first, then subtract each row's largest score, or call softmax.""")
def check_softmax_weights(student):
    def reference(q, k, causal):
        return model.attention_weights(q, k, "softmax", causal=causal)

    def why(bad):
        if scale > 1:
            return "exp overflows: subtract each row's largest score first, or call softmax."
        if bad[..., 1:, :].any():
            return "inf times 0 is NaN: use masked_fill." if causal else ""
        return "Token 0 sees no key, not even itself: mask strictly above the diagonal."

    for (size, tokens), causal in product(((3, 7), (5, 4)), (False, True)):
        (q, k), shape = random_normal(2, 2, 3, tokens, size), (2, 3, tokens, tokens)
        root = math.sqrt(size)
        visible = torch.ones(tokens, tokens).tril(0 if causal else tokens) > 0
        mistakes = {
            "The scores are not divided by the square root of D.": reference(q * root, k, causal),
            "The scores are divided by D, not by its square root.": reference(q / root, k, causal),
        }
        for scale, large in ((1, ""), (1e4, ", large scores"), (1e10, ", huge scores")):
            case, expected = f" (causal={causal}{large})", reference(scale * q, k, causal)
            weights = output(student, scale * q, k, causal, shape=shape, case=case, why=why)
            if scale > 1 and (weights * ~visible).any():
                raise Wrong(f"A score falls below the mask{case}: hide the future with -inf.")
            if scale == 1 and close(weights.sum(dim=-2), torch.ones(tokens).double()):
                raise Wrong("The weights of a key sum to 1: take the softmax over the keys.")
            if scale == 1:  # otherwise a visible weight may be 0
                check_weights(weights, visible, case)
            assert_close(weights, expected, f"The weight (D={size}){case}", mistakes)


@exercise("""Eq. (4) is the closed form: what are p, and the mean and the variance of s under p?
p = softmax(c * scores). Weight s_i in the mean by p_i, and (s_i - mean)^2 as well.""")
def check_entropy_slope(student):
    def slope(p, mean):
        return -c * (p * (s - mean).square()).sum(dim=-1)

    s = random_normal(2, 3, 5)
    for c in (0.7, 1.6):
        variable = torch.full((2, 3, 1), c, dtype=torch.float64, requires_grad=True)
        entropy = model.entropy(torch.softmax(variable * s, dim=-1))
        expected = torch.autograd.grad(entropy.sum(), variable)[0].squeeze(-1)
        p, other = torch.softmax(c * s, dim=-1), torch.softmax(s, dim=-1)
        mean = (other * s).sum(dim=-1, keepdim=True)
        mistakes = {
            "There is one factor c too many.": c * expected,
            "It takes the standard deviation, not the variance.": -c * (-expected / c).sqrt(),
            "The mean of the scores is not weighted by p.": slope(p, s.mean(dim=-1, keepdim=True)),
            "The variance is not weighted by p.": -c * s.var(dim=-1, correction=0),
            "The variance is not weighted by p, but divided by N - 1.": -c * s.var(dim=-1),
            "c is missing in p = softmax(c * scores).": slope(other, mean),
        }
        assert_close(output(student, s, c, shape=(2, 3)), expected, f"The slope (c={c})", mistakes)


def check_attention(student, reference, q, k, v, visible, case="", mistakes=None) -> Tensor:
    """Return student(q, k, v) if it is the weighted mean of values that reference(q, k, v) is.
    visible: as in check_weights. mistakes: {sentence: wrong weights}."""
    out = output(student, q, k, v, shape=v.shape, case=case)
    check_independence(student, out, q, k, v)
    one_hot = torch.eye(v.shape[2], dtype=v.dtype).expand(*v.shape[:2], -1, -1)
    weights = output(student, q, k, one_hot, shape=one_hot.shape, case=case)
    for sentence, wrong in (mistakes or {}).items():
        if close(weights, wrong):
            raise Wrong(f"{sentence}{case}.")
    check_weights(weights, visible, case)
    assert_close(weights, reference(q, k, one_hot), f"The weight{case}")
    assert_close(out, reference(q, k, v), f"The output{case}")
    return out


def check_linear(student: Callable, *chunk_size: int) -> None:
    """Check that student(phi_q, phi_k, v) computes Eq. (5), in any form. With a chunk_size, which
    is its last argument then, it is causal and computes Eq. (15)."""

    @wraps(student)
    def attend(phi_q, phi_k, v):
        return student(phi_q, phi_k, v, *chunk_size)

    def reference(phi_q, phi_k, v):
        options = {"causal": bool(chunk_size), "mode": "parallel", "feature_map": "relu"}
        return model.nala_attention(phi_q, phi_k, v, **options)

    def run(phi_q, phi_k, case=""):
        return output(attend, phi_q, phi_k, v, shape=v.shape, case=case)

    (phi_q, phi_k), v = features(2, 2, 3, 7, 4), random_normal(2, 3, 7, 5)
    visible, mistakes, case = torch.ones(7, 7).bool(), {}, ""
    if chunk_size:
        visible, case = visible.tril(), f" (7 tokens, chunk_size={chunk_size[0]})"
        chunk = torch.arange(7) // chunk_size[0]  # of each token
        late = (chunk[:, None] >= chunk).double() + (chunk[:, None] == chunk).tril()
        sentence = "The state already holds the current chunk: read it first, then add"
        mistakes = {sentence: F.normalize(phi_q @ phi_k.mT * late, p=1, dim=-1)}
    out = check_attention(attend, reference, phi_q, phi_k, v, visible, case, mistakes)
    if not close(run(phi_q / 1e6, phi_k / 1e6), out):
        raise Wrong("Features a million times smaller change the output: an eps is too large.")
    case = " (all keys zero)"
    if run(phi_q, 0 * phi_k, case).any():
        raise Wrong(f"The output is not 0{case}.")
    gradients(attend, phi_q, 0 * phi_k, v, case=case)
    phi_q[:, :, 3], case = 0.0, " (the query of token 3 is zero)"
    assert_close(run(phi_q, phi_k, case), reference(phi_q, phi_k, v), f"The output{case}")
    assert_gradients_close(attend, reference, phi_q, phi_k, v, case=case)


def check_cost(student: Callable, *rest: int) -> None:
    """Check that student(phi_q, phi_k, v, *rest) has linear cost and no loop over single tokens."""
    size, tokens, costs, flops = 32, 512, [], []
    for n in (tokens, 2 * tokens):
        phi_q, phi_k, v = features(3, 1, 1, n, size)
        with FlopCounterMode(display=False) as counter, Recorder() as recorder:
            call(student, phi_q, phi_k, v, *rest)
        costs.append(recorder)
        flops.append(counter.get_total_flops())  # counts matrix products only
    if costs[1].operations - costs[0].operations >= tokens:
        raise Wrong("It loops over single tokens in Python: its number of operations grows with N.")
    if costs[1].peak > 2.4 * costs[0].peak:
        raise Wrong("Its memory is quadratic: twice the tokens need far more than twice as much.")
    if costs[0].peak >= tokens * size * (size + 1) * 8:  # bytes
        raise Wrong("It holds F x M numbers for every token at once: sum with a matrix product.")
    if flops[1] > 2.4 * flops[0]:
        raise Wrong("Its work is quadratic: add each key to the sum of phi_k^T [v 1] only once.")


@exercise("""In (5), the query does not depend on i: what can be summed over the keys without it?
Keys meet values first: phi_k^T v is (B, H, F, M). The normaliser needs the sum of phi_k.
For a row without mass, replace the 0 in the denominator before you divide, not after.""")
def check_linear_attention(student):
    check_linear(student)
    check_cost(student)


@exercise("""Call the attention twice. What differs between the two calls, and what must not?
torch.linalg.vector_norm of a whole tensor is one number; divide by that of the first output.""")
def check_norm_microscope(student):
    def attention(q, k, v):
        calls.append((q, k, v))
        return inner(q, k, v)

    (q, k, v), norm = random_normal(3, 2, 3, 5, 4), torch.linalg.vector_norm
    for inner, ratio in ((model.softmax_attention, 3.0), (model.nala_attention, 0.5)):
        calls, case = [], f" (factor={ratio:g}, {inner.__name__})"
        got = call(student, attention, q, k, v, ratio)
        got = torch.tensor(got, dtype=torch.float64) if isinstance(got, (int, float)) else got
        got = valid_tensor(got, (), "The result")
        for i, (what, x) in enumerate((("keys", k), ("values", v)), start=1):
            if not all(close(given[i], x) for given in calls):
                raise Wrong(f"The {what} are changed: rescale only the queries.")
        for factor in (1.0, ratio):
            if not any(close(given[0], factor * q) for given in calls):
                raise Wrong(f"The attention is never called with {factor:g} * q{case}.")
        out, changed = inner(q, k, v), inner(ratio * q, k, v)
        change, growth = changed - out, norm(changed) / norm(out) - 1
        expected = norm(change) / norm(out)
        ratios = norm(change, dim=-1) / norm(out, dim=-1)
        mistakes = {
            "The change is not divided by the norm of the output.": norm(change),
            "It is divided by the norm of the changed output.": norm(change) / norm(changed),
            "Take the norm of the difference, not the difference of norms.": growth,
            "It is a mean over tokens: take norms of the whole output.": ratios.mean(),
        }
        assert_close(got, expected, f"The relative change{case}", mistakes)


@exercise("""When does relu(q_j) * relu(k_j) vanish although q_j * k_j is positive?
relu(-q) * relu(-k) is |q_j k_j| where both are negative, and 0 elsewhere.""")
def check_dropped_share(student):
    q, k = random_normal(2, 3, 5, 6)
    products, total = q * k, (q * k).abs().sum(dim=-1)
    both = (q < 0) & (k < 0)
    negative, agreeing = (products * both).sum(dim=-1), products.relu().sum(dim=-1)
    kept = (agreeing - negative) / total
    mistakes = {
        "It includes channels of opposite signs: they do not agree.": 1 - kept,
        "Divide by the sum of all |q_j k_j|, not of those that agree.": negative / agreeing,
        "It is not divided by the sum of all |q_j k_j|.": negative,
        "It divides by a sum without absolute values.": negative / products.sum(dim=-1),
    }
    assert_close(output(student, q, k, shape=(3, 5)), negative / total, "The share", mistakes)
    if not close(output(student, q / 1e6, k / 1e6, shape=(3, 5)), negative / total):
        raise Wrong("Inputs a million times smaller change the share: use no eps and no clamp.")
    for case, pair in ((" (zero query)", (0 * q, k)), (" (zero key)", (q, 0 * k))):
        got = output(student, *pair, shape=(3, 5), case=case)
        assert_close(got, 0 * got, f"The share{case}")


@exercise("""The direction is q / |q|, but (12) divides by its largest channel: what happens to |q|?
The exponent is one number per query, (..., 1): take the norm with keepdim=True.
A zero query gives 0/0: replace its largest channel by 1. torch.pow does the rest.""")
def check_query_magnitude(student):
    def run(q, lam=3.0, tau=0.5, case="", why=""):
        return output(student, q, lam, tau, shape=q.shape, case=case, why=lambda _: why)

    def reference(q, lam=3.0, tau=0.5):
        norm, direction = model.decompose(q)
        return model.query_magnitude(direction, model.query_power(norm, lam, tau))

    def divided(function):  # a factor that all channels share cancels in (5), and here
        return lambda q: F.normalize(function(q, 3.0, 0.5), p=1, dim=-1)

    q = random_normal(2, 5, 4)
    got = run(q, why="A negative number to a fractional power is NaN: take the absolute value.")
    shares, shorter = (x / x.amax(dim=-1, keepdim=True) for x in (got, run(q / 4)))
    if (got < 0).any():
        raise Wrong("A magnitude is negative: take the absolute value of the direction.")
    if close(shorter, shares, 1e-3):
        raise Wrong("A query with a quarter of the norm has the same magnitude: the norm cancels.")
    if not close(got, shares):
        raise Wrong("The largest channel of each query must be 1, Eq. (12): scale each separately.")
    if not close(run(q[:1]), got[:1]):
        raise Wrong("Queries are mixed: each has its own norm and its own largest channel.")
    norm, direction = model.decompose(q)
    powers = {
        "The tanh is missing from the power.": 3 * (0.5 + norm),
        "tau is outside the brackets: the power is lam * (tau + tanh).": 0.5 + 3 * norm.tanh(),
        "tau is missing from the power.": 3 * norm.tanh(),
        "lam is missing from the power.": 0.5 + norm.tanh(),
    }
    mistakes = {text: model.query_magnitude(direction, power) for text, power in powers.items()}
    assert_close(got, reference(q), "The magnitude", mistakes)
    for name, value in {"lam": 2.0, "tau": 0.8}.items():
        changed, fixed = {name: value}, {f"{name} has a fixed value: use the argument.": got}
        what = f"The magnitude ({name}={value})"
        assert_close(run(q, **changed), reference(q, **changed), what, fixed)
    case = " (is the norm detached?)"
    assert_gradients_close(divided(student), divided(reference), q, case=case)
    why = "Divide by the largest channel before the power, Eq. (12)."
    many = run(1 + random_normal(5, 16) / 10, 500.0, case=" (lam=500)", why=why)
    if not close(many.amax(dim=-1), torch.ones(5).double()):
        raise Wrong(f"The largest channel is not 1 (lam=500): the power underflows. {why}")
    zero = q / 1e3
    zero[0, 0], zero[0, 1, 2] = 0.0, 0.0
    for case, x in ((" (norms near 1e-9)", q / 1e9), (" (a query or a channel is zero)", zero)):
        assert_close(run(x, case=case), reference(x), f"The magnitude{case}")
    gradients(student, zero, 3.0, 0.5, case=case)


@exercise("""What is the derivative of tanh? And the derivative of tau?
The derivative of tanh(x) is 1 - tanh(x)^2; tau is a constant.""")
def check_power_slope(student):
    for lam in (2.5, 0.8):
        norm = torch.linspace(0, 30, 50).double()[:, None]
        tanh = norm.tanh()
        expected = lam * (1 - tanh**2)
        mistakes = {
            "It is the power itself, not its slope.": model.query_power(norm, lam),
            "The factor lam is missing: in (7) it also multiplies tanh.": expected / lam,
            "The tanh is not squared.": lam * (1 - tanh),
            "It grows with the norm: subtract the square of tanh from 1.": lam * (1 + tanh**2),
            "It is lam * tanh^2: subtract that from lam.": lam * tanh**2,
        }
        got = output(student, norm, lam, shape=(50, 1), case=" (norms from 0 on)")
        assert_close(got, expected, f"The slope (lam={lam})", mistakes)


@exercise("""As the norm grows, the direction's largest channel wins. What if all keys agree in it?
Make all keys equal in one channel, and let one key stand out in each of the others.
Make that channel the largest of the direction, but keep some of each of the others.""")
def check_counterexample(student):
    pair = call(student)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise Wrong("It must return two tensors: the direction (D,) and the keys (N, D).")
    if not all(torch.is_tensor(x) and x.is_floating_point() and x.isfinite().all() for x in pair):
        raise Wrong("Direction and keys must be finite floating-point tensors.")
    direction, keys = (x.detach().double() for x in pair)
    if direction.ndim == 2 and keys.ndim == 1:
        raise Wrong("The two are in the wrong order: return the direction first, then the keys.")
    if direction.ndim != 1 or keys.ndim != 2 or keys.shape[1] != len(direction):
        shapes = f"{tuple(direction.shape)} and {tuple(keys.shape)}"
        raise Wrong(f"The shapes are {shapes}, expected (D,) and (N, D).")
    if abs(direction.norm() - 1) > 1e-6:
        raise Wrong(f"The direction has norm {direction.norm():.4g}, expected 1.")
    if len(direction) < 3:
        raise Wrong("The notebook's example has two channels: find one with three or more.")
    if abs(small := min(direction.tolist(), key=abs)) < 0.1 - 1e-6:
        what = f"Channel {direction.tolist().index(small)} of the direction is {small:.3g}"
        raise Wrong(f"{what}: it must be at least 0.1 or at most -0.1.")
    if not keys.any(dim=-1).all():
        raise Wrong("A key is zero: it has no direction and no weight.")
    if not (used := keys.any(dim=0)).all():
        raise Wrong(f"Channel {used.tolist().index(False)} is 0 in all keys: it does not count.")
    if len(keys) < 2:
        raise Wrong("With fewer than two keys, the entropy is 0 for any norm.")
    q = torch.stack([0.1 * direction, 3 * direction])[:, None, None].expand(-1, -1, len(keys), -1)
    weights = model.attention_weights(q, keys.expand_as(q))[:, 0, 0]  # (2, N)
    low, high = model.entropy(weights).tolist()
    if high < low + 0.01:
        verb = "falls" if high < low - 0.01 else "hardly changes"
        raise Wrong(f"The entropy {verb}: {low:.3f} for norm 0.1, {high:.3f} for norm 3.")


def _check_map(student, reference, mistakes_of, *alpha):
    """Check what both maps must do. Only norms and inner products of their features count, so the
    order of the features or a rotation does not matter. mistakes_of(a, d): {sentence: features}."""
    one, case = torch.ones(1, 1).double(), f" (alpha={alpha[0]:g})" if alpha else ""
    a, d = features(12, 4), model.decompose(random_normal(12, 4))[1]  # of 6 queries and 6 keys
    pairs = zip(a.split(6), d.split(6), strict=True)  # a call each: a query must not see its key
    phi = torch.cat([output(student, *pair, *alpha, shape=(6, 8)) for pair in pairs])
    for sentence, halves in mistakes_of(a, d).items():
        wrong = torch.cat(halves, dim=-1)
        if close(phi @ phi.mT, wrong @ wrong.mT):
            raise Wrong(sentence)
    if alpha:
        few, many = (output(student, one, one / 9, x, shape=(1, 2)) for x in (4.0, 20.0))
        if close(few, many):
            raise Wrong("alpha makes no difference: the angle must depend on it.")
    if not close(phi.norm(dim=-1), a.norm(dim=-1)):
        raise Wrong(f"The norm of the features differs from that of the magnitude{case}.")
    plus, minus = (output(student, one, sign * one, *alpha, shape=(1, 2)) for sign in (1, -1))
    product = (plus * minus).sum().item()
    if product < -1e-9:
        raise Wrong(f"Opposite signs give a negative product, {product:.3g}{case}.")
    if product > 0.01:
        raise Wrong(f"Opposite signs give the product {product:.3g}, expected almost 0{case}.")
    (phi_q, phi_k), (right_q, right_k) = (x.split(6) for x in (phi, reference(a, d, *alpha)))
    what = f"The inner product of query and key{case}"
    assert_close(phi_q @ phi_k.mT, right_q @ right_k.mT, what)


@exercise("""cos(x - y) = cos(x) cos(y) + sin(x) sin(y): which two numbers must a channel keep?
The angle is (pi/4) tanh(alpha * direction), and the magnitude is a factor of both halves.""")
def check_cosine_features(student):
    def mistakes_of(a, d):
        angle = 45 * torch.tanh(alpha * d)
        degrees = [a * angle.cos(), a * angle.sin()]
        return {"The angle goes up to 45 radians: 45 degrees are pi/4.": degrees}

    for alpha in (20.0, 4.0):
        _check_map(student, model.cosine_map, mistakes_of, alpha)


@exercise("""Two halves: which channels of the magnitude go into the first, which into the second?
A comparison gives a mask, and a magnitude times a mask is the magnitude or 0.""")
def check_sign_split(student):
    def mistakes_of(a, d):
        plus, minus, up, down = (d > 0).double(), (d < 0).double(), d.relu(), (-d).relu()
        return {
            "Both halves hold the positive channels.": [a * plus, a * plus],
            "The negative channels are lost.": [a * plus, 0 * a],
            "The magnitude is missing: each channel holds 1 instead.": [plus, minus],
            "It also uses the size of the direction: use only its sign.": [a * up, a * down],
        }

    _check_map(student, model.sign_split, mistakes_of)
    one = torch.ones(1, 1).double()
    if output(student, one, 0 * one, shape=(1, 2)).any():
        raise Wrong("A channel of direction 0 has no sign: it belongs to neither half.")


@exercise("""Which comes first in (14): adding the new token to the state, or reading the state?
[v 1] has M + 1 channels; the state grows by the outer product of phi_k with it.
One product phi_q S gives M + 1 numbers: the last is the normaliser of the others.""")
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
        after = valid_tensor(result[1], (2, 3, 5, 7), "The state", case)
        return valid_tensor(result[0], (2, 3, 6), "The output", case), after

    (phi_q, phi_k), v = features(2, 2, 3, 4, 5), random_normal(2, 3, 4, 6)
    state = torch.zeros(2, 3, 5, 7).double()
    for t in range(4):
        q, k, value = token = [x[:, :, t] for x in (phi_q, phi_k, v)]
        case = f" (token {t}, which sees itself)"
        (out, after), (right, expected) = run(state, *token, case=case), reference(state, *token)
        mistakes = {
            "The state forgets the earlier tokens.": expected - state,
            "The normaliser is in the first column of the state.": expected.roll(1, dims=-1),
        }
        assert_close(after, expected, f"The state{case}", mistakes)
        unseen, _ = reference(state, q, 0 * k, value)
        numerator = torch.einsum("bhf,bhfm->bhm", q, expected[..., :-1])
        mistakes = {
            "The token does not see itself: add it before you read the state.": unseen,
            "The output is not divided by the normaliser.": numerator,
        }
        assert_close(out, right, f"The output{case}", mistakes)
        state = expected
    out, _ = run(0 * state, q / 1e6, k / 1e6, value, case=" (small features)")
    if not close(out, value):
        raise Wrong("Features a million times smaller change the output: an eps is not small then.")
    out, _ = run(0 * state, q, 0 * k, value, case=" (all keys zero)")
    assert_close(out, 0 * out, "The output (all keys zero)")
    token, case = (state, q * torch.tensor([0, 1, 1])[:, None], k, value), " (a query is zero)"
    assert_close(run(*token, case=case)[0], reference(*token)[0], f"The output{case}")
    assert_gradients_close(student, reference, *token, case=case)


@exercise("""A chunk needs the sum of phi_k^T [v 1] over all chunks before it, and a tril within.
Carry that sum from chunk to chunk: first read it, then add the chunk to it.
The last chunk may be shorter: slicing takes care of it. Divide once, at the end.""")
def check_chunked_attention(student):
    for chunk_size in (3, 1, 7, 9):
        check_linear(student, chunk_size)
    check_cost(student, 64)


@exercise("""With the query phi_i, key i gets the weight phi_i . phi_i. What do all get together?
Together they get the sum of phi_i . phi_j over j: phi_i . z, where z is the sum of phi_j.""")
def check_interference(student):
    def reference(phi_k):
        own, total = phi_k.square().sum(dim=-1), (phi_k @ phi_k.mT).sum(dim=-1)
        return torch.where(total > 0, 1 - own / total.masked_fill(total == 0, 1.0), 0.0)

    phi_k = features(2, 3, 7, 4)
    out = output(student, phi_k, shape=(2, 3, 7))
    check_independence(student, out, phi_k)
    own, total = phi_k.square().sum(dim=-1), (phi_k @ phi_k.mT).sum(dim=-1)
    mistakes = {
        "It is the share of the key itself: the others have the rest.": own / total,
        "The key's own weight is phi_i . phi_i, a sum of squares.": 1 - phi_k.sum(-1) / total,
    }
    assert_close(out, reference(phi_k), "The share", mistakes)
    zero, case = phi_k * (torch.arange(7) != 2)[:, None], " (a key without features)"
    out = output(student, zero, shape=(2, 3, 7), case=case)
    assert_close(out, reference(zero), f"The share{case}")
    assert_gradients_close(student, reference, zero, case=case)
    check_cost(lambda phi_q, phi_k, v: student(phi_k))


@exercise("""The product of two keys is small only if no feature is large in both.
Keep positive and negative channels apart, as the sign split does: that gives 2D features.
Now make a key's largest channels count most. What did the power do in (7) and (8)?""")
def check_own_features(student):
    x = random_normal(2, 3, 7, 5)
    phi = output(student, x, shape=(2, 3, 7, 10))
    if (phi < 0).any():
        raise Wrong(f"A feature is negative, {phi.min().item():.3g}, so weights can be negative.")
    if not (phi.sum(dim=-1) > 0).all():
        raise Wrong("All features of some x are 0: such a key cannot be stored.")
    if not close(output(student, x[:1, :1, 3:4], shape=(1, 1, 1, 10)), phi[:1, :1, 3:4]):
        raise Wrong("A token has different features when it is alone: it must not see the others.")
    gradients(student, x)
    k, v = random_normal(200, 1, 16, 16), random_normal(200, 1, 16, 16)
    phi = output(student, k, shape=(200, 1, 16, 32))
    read = F.normalize(phi @ phi.mT, p=1, dim=-1) @ v
    error = (read - v).square().mean().item()
    if not error < 0.6:
        raise Wrong(f"16 pairs are read with a squared error of {error:.2f}: it must be below 0.6.")


def _outer(k, v):
    return k[..., :, None] * v[..., None, :]


@exercise("""There are two steps, in this order: multiply the state, then add the token.
decay has one number per feature, so per row of the state: add a last axis to it.""")
def check_decay_step(student):
    def reference(state, k, v, decay):
        return decay[..., None] * state + _outer(k, v)

    state, k, v = random_normal(2, 3, 5, 6), features(2, 3, 5), random_normal(2, 3, 6)
    decay = torch.rand(2, 3, 5, dtype=torch.float64)
    rows, new = decay[..., None], _outer(k, v)
    mistakes = {
        "The new token also fades: write it after the decay.": rows * (state + new),
        "The past is multiplied by 1 - decay.": (1 - rows) * state + new,
        "The key fades, not the past.": state + rows * new,
        "It uses the same decay for every feature.": rows.mean(dim=-2, keepdim=True) * state + new,
    }
    out = output(student, state, k, v, decay, shape=state.shape)
    assert_close(out, reference(state, k, v, decay), "The state", mistakes)
    assert_gradients_close(student, reference, state, k, v, decay)


@exercise("""What does the key read before the token is written? k S, one number per channel of v.
The state grows by the outer product of k with the error: v minus what k reads.
share multiplies the whole error: with share = 1, the key reads v afterwards.""")
def check_delta_step(student):
    def reference(state, k, v, share):
        return state + _outer(k, share[..., None] * (v - (k[..., None, :] @ state).squeeze(-2)))

    state, v = random_normal(2, 3, 5, 6), random_normal(2, 3, 6)
    k, share = F.normalize(features(2, 3, 5), dim=-1), torch.rand(2, 3, dtype=torch.float64)
    part, read = share[..., None], (k[..., None, :] @ state).squeeze(-2)
    changes = {
        "It only adds, like linear attention: subtract what the key reads.": v,
        "It adds a share of v, but removes nothing.": part * v,
        "share multiplies what is removed, but not v.": v - part * read,
        "share multiplies v, but not what is removed.": part * v - read,
        "It moves away from v: the difference has the wrong sign.": part * (read - v),
    }
    mistakes = {sentence: state + _outer(k, change) for sentence, change in changes.items()}
    out = output(student, state, k, v, share, shape=state.shape)
    assert_close(out, reference(state, k, v, share), "The state", mistakes)
    assert_gradients_close(student, reference, state, k, v, share)


def check_causal_attention(student):
    """Check a causal norm-aware attention with a mask for padding, Eqs. (7) to (10) and (12)."""

    def check_case(mask, q, k, case=""):
        @wraps(student)
        def attend(q, k, v):
            return student(q, k, v, mask[: len(q)])

        def reference(q, k, v):
            return model.attention_weights(q, k, causal=True, key_mask=mask) @ v

        check_attention(attend, reference, q, k, v, causal & mask[:, None, None], case)

    (q, k), v = random_normal(2, 2, 3, 11, 4), random_normal(2, 3, 11, 5)
    all_real, causal = torch.ones(2, 11).bool(), torch.ones(11, 11).bool().tril()
    some_real = all_real.clone()
    some_real[0, [2, -2, -1]] = some_real[1, [1, 5, -1]] = False
    out, shorter = (output(student, x, k, v, all_real, shape=v.shape) for x in (q, q / 8))
    if close(out, shorter, 1e-3):
        raise Wrong("A query with an eighth of the norm has the same weights: the norm cancels.")
    check_case(all_real, q, k)
    check_case(some_real, q, k, " (some keys are padding)")
    check_case(all_real, q, k / 1e3, " (small keys)")
    check_case(all_real, q / 1e4, k, " (queries of norm 1e-4)")
    out = output(student, 0 * q, k, v, all_real, shape=v.shape, case=" (zero queries)")
    assert_close(out, 0 * out, "The output (zero queries)")
    gradients(lambda q, k, v: student(q, k, v, some_real), q, k, v)


for name, hints in {
    "attention_a": """Which tokens show the symptom, and which do not? What do they see?
Follow key_mask to the end: where do the masked keys still count?""",
    "attention_b": """Which tokens show the symptom? Are the two in the message in the same chunk?
Write down which chunks states[:, :, c] sums, for c = 0. Which should it sum?""",
    "attention_c": """What happens in (5) to a positive factor that all features of a query share?
Compare the magnitude with Eq. (7): which part is the base, and which is the exponent?""",
}.items():
    exercise(hints, name)(check_causal_attention)

BUGS = {  # the diagnoses that students choose from
    "padding in the normaliser": "A masked key adds no value, but still counts in the normaliser.",
    "heads share a normaliser": "The normaliser sums over the heads as well.",
    "eps too large": "A constant in the denominator swallows the weights of small keys.",
    "own token unseen": "The causal mask also removes the diagonal.",
    "no mask within a chunk": "A token sees later tokens of its chunk.",
    "state read too late": "A chunk reads the state after adding itself to it.",
    "power as a factor": "The power multiplies the channels, so it cancels in the division.",
    "layer norm on the query": "The norm of the query is removed before it is measured.",
    "angles too wide": "Angles differ by more than pi/2, where the cosine is negative.",
}
# zlib.crc32 of "<function>: <bug>", so this file does not show the answers.
ANSWERS = (1037124925, 2408625119, 2049225717)


def known(name: str) -> str:
    """Return name if it is an exercise, otherwise raise ValueError."""
    if name not in EXERCISES:
        raise ValueError(f"the exercise must be one of {', '.join(EXERCISES)}: {name!r}")
    return name


def check_exercise(namespace: dict[str, object], name: str) -> None:
    """Check the function called name in the namespace of a student's file. Raises Wrong."""
    student, remark = namespace.get(name), ""
    if not callable(student):
        raise Wrong(f"There is no function {name} in this file.")
    if name not in LESSONS["find_the_bug"]:
        return EXERCISES[name](student)
    diagnosis = namespace.get("DIAGNOSES", {}).get(name)
    if not diagnosis:
        remark = f" DIAGNOSES has no name for the bug in {name} yet: print(checks.BUGS)."
    elif diagnosis not in BUGS:
        remark = f" The diagnosis {diagnosis!r} is not in checks.BUGS: {', '.join(BUGS)}."
    try:
        EXERCISES[name](student)
    except Wrong as symptom:  # the diagnosis is judged only after the fix
        raise Wrong(f"{symptom}{remark}") from symptom.__cause__
    if zlib.crc32(f"{name}: {diagnosis}".encode()) not in ANSWERS:
        remark = remark or f" The diagnosis {diagnosis!r} is wrong."
        raise Wrong(f"It is fixed, but its bug is not named.{remark}")
