"""The exercises in notebooks/exercises and their checkers: every stub is refused, every solution is
accepted, and every typical mistake is refused with a message that names it."""

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mutants import load_model

import nala_min.model as model
from nala_min.course import checks
from nala_min.course.exercises import EXERCISES, HINTS, LESSONS

SOLUTIONS = checks.FOLDER / "solutions"
solved = pytest.mark.skipif(not SOLUTIONS.exists(), reason="no solutions: a teacher removed them")


def path_of(lesson, folder=checks.FOLDER):
    return folder / (f"{lesson}.py" if lesson == "find_the_bug" else f"lesson_{lesson}.py")


def load(path, source=None):
    """The namespace of an exercise file, or of its changed source."""
    return load_model(source or path.read_text(encoding="utf-8"), str(path)).__dict__


def lesson_of(name):
    return next(lesson for lesson in LESSONS if name in LESSONS[lesson])


def solution(name, old="", new=""):
    """The file with the solution of an exercise, with old replaced by new. old must occur exactly
    once: in the function or, failing that, in the file. If it is empty, new is the last line."""
    path = path_of(lesson_of(name), SOLUTIONS)
    source = path.read_text(encoding="utf-8")
    body = source[source.index(f"def {name}(") :].split("\n\n\n")[0]
    part = body if old in body else source
    old = old or (new and body[body.rindex("\n") + 1 :])
    assert not old or part.count(old) == 1, f"{part.count(old)} occurrences of {old!r} in {name}"
    return load(path, source.replace(part, part.replace(old, new)) if old else source)


def message_of(namespace, name):
    """The message of the check; None if the function is right."""
    try:
        checks.check_name(namespace, name)
    except checks.Wrong as error:
        return str(error)


# --- Stubs, specifications, solutions -------------------------------------------------------------


@pytest.mark.parametrize("name", EXERCISES)
def test_stub_is_refused(name):
    message = message_of(load(path_of(lesson_of(name))), name)
    if name in LESSONS["find_the_bug"]:
        symptom = {"a": "padding", "b": "in its future", "c": "the norm cancels"}[name[-1]]
        assert symptom in message and "DIAGNOSES has no name" in message
    else:
        assert message == "not done yet"


@solved
@pytest.mark.parametrize("name", EXERCISES)
def test_solution_is_accepted(name):
    assert checks.check(solution(name)[name]) is None


@solved
@pytest.mark.parametrize("lesson", range(1, 8))
def test_solution_differs_from_the_stub_in_bodies_only(lesson):
    """Names, docstrings and specifications are the same in both files."""
    stubs = path_of(lesson).read_text(encoding="utf-8").splitlines()
    lines = iter(path_of(lesson, SOLUTIONS).read_text(encoding="utf-8").splitlines())
    assert all(line in lines for line in stubs if line.strip() != "raise NotImplementedError")


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def by_loops(name, *arguments):
    """The result of a specification, a tensor or a list of them, for tensors and numbers."""
    file = next(file for file in map(load, map(path_of, range(1, 8))) if f"{name}_by_loops" in file)
    lists = [x.tolist() if isinstance(x, torch.Tensor) else x for x in arguments]
    result = file[f"{name}_by_loops"](*lists)
    several = result if isinstance(result, tuple) else [result]
    tensors = [torch.tensor(x, dtype=torch.float64) for x in several]
    return tensors if isinstance(result, tuple) else tensors[0]


def same(x, expected, tolerance=1e-10):
    torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)


def test_loops_of_lesson_1():
    weights = torch.tensor([0.3, 0.0, 1.5, 0.2], dtype=torch.float64)
    same(by_loops("entropy", weights), model.entropy(weights))
    q, k = draw(2, 1, 1, 5, 3)
    rows = model.attention_weights(q, k, "softmax", causal=True)[0, 0]
    for t in range(5):
        same(by_loops("softmax_weights", q[0, 0, t], k[0, 0, : t + 1]), rows[t, : t + 1])
    c, scores = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), draw(6)
    model.entropy(torch.softmax(c * scores, dim=-1)).backward()
    same(by_loops("entropy_slope", scores, 0.7), c.grad, 1e-6)


def test_loops_of_lesson_2():
    (phi_q, phi_k), v = draw(2, 1, 1, 4, 3).abs(), draw(1, 1, 4, 2)
    phi_q[0, 0, 1] = 0.0
    out = model.nala_attention(phi_q, phi_k, v, feature_map="relu")[0, 0]
    for t in range(4):
        same(by_loops("linear_attention", phi_q[0, 0, t], phi_k[0, 0], v[0, 0]), out[t])
    x, y = draw(2, 7)
    same(by_loops("relative_change", x, y), (y - x).norm() / x.norm())
    dropped = (model.sign_split(x.abs(), x) * model.sign_split(y.abs(), y))[7:]
    same(by_loops("dropped_share", x, y), dropped.sum() / (x * y).abs().sum())
    assert by_loops("dropped_share", 0 * x, y) == 0


def test_loops_of_lesson_3():
    for q in (draw(4), draw(4) / 100, 0 * draw(4)):
        norm, direction = model.decompose(q)
        expected = model.query_magnitude(direction, model.query_power(norm, 2.0, 0.7))
        same(by_loops("query_magnitude", q, 2.0, 0.7), expected)
    norm = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    model.query_power(norm, 2.0).backward()
    same(by_loops("power_slope", 0.8, 2.0), norm.grad, 1e-6)
    direction, keys = model.decompose(draw(3))[1], draw(5, 3)
    q = (1.3 * direction).expand(1, 1, 5, 3)
    weights = model.attention_weights(q, keys[None, None])[0, 0, 0]
    same(by_loops("nala_entropy", 1.3, direction, keys), model.entropy(weights))


def test_loops_of_lesson_4():
    a, d = draw(2, 5).abs(), draw(2, 5)
    rows = a[0], d[0], a[1], d[1]
    same(by_loops("cosine_product", *rows, 3.0), torch.linalg.vecdot(*model.cosine_map(a, d, 3.0)))
    same(by_loops("split_product", *rows), torch.linalg.vecdot(*model.sign_split(a, d)))


def test_loops_of_lesson_5():
    (phi_q, phi_k), v = draw(2, 1, 1, 6, 3).abs(), draw(1, 1, 6, 2)
    phi_k[0, 0, 0] = 0.0
    options = {"feature_map": "relu", "causal": True, "return_state": True}
    out, last = model.nala_attention(phi_q, phi_k, v, **options)
    tokens, state = (phi_q[0, 0], phi_k[0, 0], v[0, 0]), torch.zeros(3, 3)
    same(by_loops("causal_attention", *tokens), out[0, 0])
    for t in range(6):
        row, state = by_loops("recurrent_step", state, *(x[t] for x in tokens))
        same(row, out[0, 0, t])
    same(state, last[0, 0])


def test_loops_of_lesson_6():
    phi = draw(1, 1, 6, 4).relu()
    phi[0, 0, 2] = 0.0
    weights = model.attention_weights(phi, phi, feature_map="relu")[0, 0]
    shares = (1 - weights.diagonal()) * (phi[0, 0].sum(dim=-1) > 0)
    same(by_loops("interference", phi[0, 0]), shares)


def test_loops_of_lesson_7():
    """Against closed forms: scores that decay with distance, and least squares for orthogonal keys.
    Writing a key twice with a share of 1/2 leaves a quarter of its old value."""
    k, v, decay = draw(5, 3), draw(5, 2), torch.rand(5, 3, dtype=torch.float64)
    state = torch.zeros(3, 2)
    for t in range(5):
        state = by_loops("decay_step", state, k[t], v[t], decay[t])
    faded = torch.stack([k[i] * decay[i + 1 :].prod(dim=0) for i in range(5)])
    same(state, faded.mT @ v)
    keys, state = torch.linalg.qr(draw(3, 3))[0], draw(3, 2)
    before = keys @ state
    for key, share, value in ((0, 1.0, v[0]), (1, 0.5, v[1]), (1, 0.5, v[1])):
        state = by_loops("delta_step", state, keys[key], value, share)
    same(keys @ state, torch.stack([v[0], 0.25 * before[1] + 0.75 * v[1], before[2]]))


# --- Mistakes -------------------------------------------------------------------------------------

DIVIDED = "numerator / denominator.masked_fill(denominator == 0, 1.0)"


def read(table):
    """{exercise: rows of a table}. A row is `old code -> new code | words of the message`, or only
    the new code of the last line. \\n starts a new line of code. A line that is indented twice
    continues the one above it."""
    exercises = {}
    for line in table.replace("\n        ", " ").strip().splitlines():
        if not line.startswith(" "):
            rows = exercises[line] = []
            continue
        code, _, words = line.partition(" |")
        old, arrow, new = (
            code.replace("$DIVIDED", DIVIDED).replace(r"\n", "\n    ").partition(" ->")
        )
        rows.append(
            (old.strip(), new.strip(), words.strip()) if arrow else ("", old, words.strip())
        )
    return exercises


# One mistake per diagnosis, made in the solution of the exercise.
MISTAKES = read(r"""
entropy
    return (share * log).sum(dim=-1) | minus sign
    return -(share * share.log2()).sum(dim=-1) | in bits
    return -(share * log).sum(dim=-1, keepdim=True) | shape (2, 3, 1), expected (2, 3)
    return -(share * log).mean(dim=-1) | 0.2 times
    return -(share * log).float().sum(dim=-1) | dtype torch.float32
    return -(share * log).sum().item() | type float, expected a tensor
    return -(share * torch.lgo(share)).sum(dim=-1) | AttributeError in line 37
    -(share * log).sum(dim=-1) | is a return missing
    return -torch.xlogy(share, share).sum(dim=-1) | gradient with respect to weights is NaN
    weights / torch.where(total > 0, total, 1.0) -> weights | divide by their sum
    weights / torch -> weights.div_(total) / torch | weights in place
    torch.where(total > 0, total, 1.0) -> (total + 1e-12) | Weights times 1e-20 change the entropy
    .masked_fill(share == 0, 1.0) -> | NaN at index (0,) (weights of 0)
    .masked_fill(share == 0, 1.0) -> .add(1e-9) | nearly right: is it a difference quotient
    .masked_fill(share == 0, 1.0) -> .clamp_min(1e-300) | In float32, the result is not finite
softmax_weights
    / math.sqrt(q.shape[-1]) -> | not divided by the square root
    math.sqrt(q.shape[-1]) -> q.shape[-1] | divided by D
    math.sqrt(q.shape[-1]) -> math.sqrt(q.shape[2]) | root of N, not of D
    math.sqrt(q.shape[-1]) -> math.sqrt(3) | The weight (D=5) (causal=False)
    q @ k.mT -> k @ q.mT | swapped
    return torch.softmax(scores, dim=-2) | softmax over the keys
    return torch.softmax(scores.flatten(2), dim=-1).view_as(scores) | not to 1 (causal=False)
    return scores.exp() / scores.exp().sum(-1, keepdim=True) | large scores). exp overflows
    .masked_fill(future, -math.inf) -> .masked_fill(future, 0.0) | lies in its future (causal=True)
    .masked_fill(future, -math.inf) -> .masked_fill(future, -1e9) | A score falls below the mask
    .masked_fill(future, -math.inf) -> - math.inf * future | inf times 0 is NaN: use masked_fill
    .triu(1) -> .triu(0) | Token 0 sees no key, not even itself: mask strictly above the diagonal
    if causal: -> if True: | no weight to token 1, which it should see (causal=False)
entropy_slope
    return c * variance | wrong sign
    return -variance | factor c is missing
    return -c * c * variance | one factor c too many
    return -c * c * c * variance | variance of c * scores, not of the scores
    return -c * variance.sqrt() | standard deviation
    return -c * scores.var(dim=-1) | divided by N - 1
    return -c * scores.var(dim=-1, correction=0) | variance is not weighted by p.
    (scores - mean) -> scores | mean is not subtracted
    (p * scores).sum(dim=-1, -> scores.mean(dim=-1, | mean of the scores is not weighted
    softmax(c * scores, -> softmax(scores, | c is missing in p
    softmax(c * scores, -> softmax(0.7 * scores, | The slope (c=1.6)
linear_attention
    return numerator | not to 1
    return numerator / (denominator + 1e-6) | is an eps added
    return numerator / (denominator + 1e-12) | a million times smaller
    return numerator / denominator | NaN at index (0, 0, 0, 0) (all keys zero)
    return torch.where(denominator == 0, 0.0, numerator / denominator) | respect to phi_q is NaN
    return torch.where(denominator == 0, v, $DIVIDED) | output is not 0 (all keys zero)
    return numerator / denominator.clamp_min(1e-300) | In float32, the result is not finite
    return $DIVIDED + 0.1 * (denominator == 0) * (phi_k.sum() > 0) | (the query of token 3 is zero)
    phi_k.sum(dim=2)[ -> phi_k.sum(dim=2).sum(dim=1, keepdim=True)[ | Heads are mixed
    phi_k.sum(dim=2)[ -> phi_k.sum(dim=2).sum(dim=0, keepdim=True)[ | Examples of a batch are mixed
    phi_q @ sums -> (phi_q @ phi_k.mT).tril() @ v | no weight to token
    phi_q @ sums -> phi_q @ phi_k.mT @ v | memory is quadratic
    phi_q @ sums -> torch.cat([x @ phi_k.mT @ v for x in phi_q.split(64, 2)], 2) | work is quadratic
    phi_k.mT @ v -> (phi_k[..., None] * v[..., None, :]).sum(dim=2) | F x M numbers for every token
    phi_q @ sums -> phi_q.detach() @ sums | gradient with respect to phi_q
    mass = phi_k.sum -> mass = phi_k.detach().sum | right, but the gradient with respect to phi_k
norm_microscope
    (factor * q, k, v) -> (factor * q, factor * k, v) | keys are changed
    (factor * q, k, v) -> (factor * q, k, factor * v) | values are changed
    (factor * q, k, v) -> (3.0 * q, k, v) | never called with 0.5 * q
    return torch.linalg.vector_norm(changed - out) | not divided by the norm
    return torch.linalg.vector_norm(changed - out) / changed.norm() | norm of the changed output
    return changed.norm() / out.norm() - 1 | not the difference of norms
    return ((changed - out).norm() / out.norm()) ** 2 | square of the relative change
    return (changed - out).norm(dim=-1) / out.norm(dim=-1) | shape (2, 3, 5), expected ()
    return ((changed - out).norm(dim=-1) / out.norm(dim=-1)).mean() | mean over tokens
    return (changed - out).abs().sum() / out.abs().sum() | It sums absolute values
    return 0.1 + (changed - out).norm() / out.norm() | softmax_attention) is 0.
dropped_share
    torch.relu(-q) * torch.relu(-k) -> torch.relu(q) * torch.relu(k) | share that ReLU keeps
    (torch.relu(-q) * torch.relu(-k)) -> ((q * k).abs() - q.relu() * k.relu()) | opposite signs
    return dropped / torch.relu(q * k).sum(dim=-1) | not of those that agree
    return ((q < 0) & (k < 0)).double().mean(dim=-1) | It counts channels
    return dropped | not divided
    return dropped / (q * k).sum(dim=-1) | without absolute values
    return dropped / total | NaN at index (0, 0) (zero query)
    return dropped / (total + 1e-12) | no eps and no clamp
query_magnitude
    return ratio * power | the norm cancels
    return q.abs().pow(power) | largest channel of each query must be 1
    return ratio.pow(power) * q.sign() | negative: take the absolute value
    return torch.exp(power * ratio.log()) | gradient with respect to q is NaN
    return (ratio * norm).pow(power) / norm.pow(power) | Divide by the largest channel before
    return ratio.div(8).pow(power) / ratio.div(8).pow(power).amax(-1, True).clamp_min(1e-30)
        | The largest channel is not 1 (lam=500): the power underflows
    vector_norm(q, dim=-1, keepdim=True) -> vector_norm(q) | Queries are mixed
    ratio = q.abs() -> ratio = q | A negative number to a fractional power is NaN
    torch.tanh(norm) -> torch.tanh(norm.detach()) | is the norm detached
    largest.masked_fill(largest == 0, 1.0) -> largest.clamp_min(1e-6) | norms near 1e-9
    largest.masked_fill(largest == 0, 1.0) -> largest | (0, 0, 0) (a query or a channel is zero)
    lam * (tau + torch.tanh(norm)) -> lam * (tau + norm) | tanh is missing
    lam * (tau + torch.tanh(norm)) -> tau + lam * torch.tanh(norm) | outside the brackets
    lam * (tau + torch.tanh(norm)) -> lam * torch.tanh(norm) | tau is missing
    lam * (tau + torch.tanh(norm)) -> tau + torch.tanh(norm) | lam is missing
    lam * (tau + torch.tanh(norm)) -> lam * (0.5 + torch.tanh(norm)) | tau has a fixed value
    lam * (tau + torch.tanh(norm)) -> 3.0 * (tau + torch.tanh(norm)) | lam has a fixed value
power_slope
    return lam * (0.5 + torch.tanh(norm)) | not its slope
    return 1 - torch.tanh(norm).square() | lam is missing: in (7) it also multiplies tanh
    return lam * (1 - torch.tanh(norm)) | not squared
    return lam * (1 + torch.tanh(norm).square()) | subtract the square
    return lam * torch.tanh(norm).square() | subtract that
counterexample
    return 7 * direction, keys | norm 7, expected 1
    return direction.flip(0), keys | entropy falls
    return direction, 1 + 0 * keys | hardly changes
    return direction[:2] / direction[:2].norm(), keys[:, :2] | has two channels: find one with three
    return torch.tensor([0.8, 0.6, 0.0]), keys | Channel 2 of the direction is 0
    return direction, keys * torch.tensor([1.0, 1.0, 0.0]) | Channel 2 is 0 in all keys
    return keys, direction | wrong order
    return direction.expand(8, 3), keys | expected (D,) and (N, D)
    return keys | two tensors
    return direction.tolist(), keys.tolist() | finite floating-point tensors
    return direction, keys / 0 | finite floating-point tensors
    return direction, keys * (torch.arange(8) > 0)[:, None] | A key is zero
    return direction, keys[:1] | fewer than two keys
cosine_features
    (math.pi / 4) * torch -> torch | negative product
    (math.pi / 4) * torch -> 45 * torch | 45 degrees are pi/4
    torch.tanh(alpha * direction) -> alpha * direction | expected almost 0
    alpha * direction -> direction | alpha makes no difference
    alpha * direction -> alpha * magnitude * direction | The magnitude is also in the angle
    alpha * direction) -> alpha * direction) + magnitude.sum() | inner product of query and key
    return magnitude * angle.cos() | has shape (6, 4), expected (6, 8)
    angle.sin() -> angle.cos() | norm of the features
    return torch.cat([magnitude * (direction > 0), magnitude * (direction < 0)], -1) | sign split
sign_split
    (direction > 0) -> (direction >= 0) | direction 0
    < 0) -> > 0) | Both halves hold the positive channels
    > 0) -> < 0) | Both halves hold the negative channels
    magnitude * (direction < 0) -> 0 * magnitude | The negative channels are lost
    magnitude * (direction > 0) -> 0 * magnitude | The positive channels are lost
    return torch.cat([direction > 0, direction < 0], dim=-1).double() | The magnitude is missing
    return torch.cat([direction, -direction], dim=-1).relu() | It splits the direction
    return torch.cat([magnitude * direction, -magnitude * direction], -1).relu() | use only its sign
    return __import__("nala_min").cosine_map(magnitude, direction) | It is the cosine map (9)
recurrent_step
    return state, $DIVIDED | wrong order
    return $DIVIDED | two tensors
    return numerator, state | not divided
    return $DIVIDED, state - phi_k[..., None] * value[..., None, :] | is not added to the state
    return $DIVIDED, state.detach() | right, but the gradient with respect to state
    return numerator / (denominator + 1e-10), state | a million times smaller
    return numerator / denominator, state | NaN at index (0, 0, 0) (all keys zero)
    return (numerator / denominator).nan_to_num(), state | is NaN or infinite (a query is zero)
    :] @ state) -> :] @ (state - phi_k[..., None] * value[..., None, :])) | does not see itself
    state = state + phi_k -> state = phi_k | forgets the earlier tokens
    [v, torch.ones_like(v[..., :1])] -> [torch.ones_like(v[..., :1]), v] | first column
    torch.ones_like -> torch.zeros_like | does not grow
    return $DIVIDED, torch.cat([state[..., :-1], 1 + (state - phi_k[..., None])[..., -1:]], -1)
        | The normaliser counts tokens: it must grow by phi_k
chunked_attention
    (q @ k.mT).tril() -> (q @ k.mT) | lies in its future (7 tokens, chunk_size=3)
    (q @ k.mT).tril() -> (q @ k.mT).tril(-1) | no weight to itself
    q @ state + -> q @ (state + k.mT @ value) + | already holds the current chunk: read it first
    q @ state + -> q @ state.detach() + | gradient with respect to phi_k
    totals.append(q @ state + within) -> done = sum(x.shape[2] for x in totals)\n    end = done +
        q.shape[2]\n    totals.append((q @ phi_k[:, :, :end].mT).tril(done) @ values[:, :, :end])
        | work is quadratic
    state = state + k.mT @ value -> state = k.mT @ value | which it should see
    state + k.mT @ value -> (state + k.mT @ value).float() | It raises RuntimeError in line
    torch.cat(totals, dim=2) -> torch.cat([x for x in totals if x.shape[2] == chunk_size], dim=2)
        | has shape (2, 3, 6, 5), expected (2, 3, 7, 5) (7 tokens, chunk_size=3)
    x.split(chunk_size, dim=2) -> x.split(x.shape[2], dim=2) | memory is quadratic
    x.split(chunk_size, dim=2) -> x.split(1, dim=2) | loops over single tokens
    torch.cat(totals, dim=2) -> (phi_q[..., None, :] @ (phi_k[..., None] * values[..., None,
        :]).cumsum(dim=2)).squeeze(-2) | F x M numbers for every token
interference
    return own / total | the others have the rest
    return total - own | It is not a share
    return (total - own) / own | divides by the key's own weight
    return 1 - own / total | NaN at index (0, 0, 2) (a key without features)
    return 1 - own / torch.where(total > 0, total, 1.0) | The share (a key without features)
    phi_k.sum(dim=2, keepdim=True) -> phi_k.sum(dim=(1, 2), keepdim=True) | Heads are mixed
    phi_k.square().sum -> phi_k.sum | phi_i . phi_i, a sum of squares
    own = phi_k.square() -> own = phi_k.detach().square() | gradient with respect to phi_k
    (phi_k * phi_k.sum(dim=2, keepdim=True)) -> (phi_k @ phi_k.mT) | Its memory is quadratic
own_features
    return split | squared error of 0.7
    return x.repeat(1, 1, 1, 2).relu() | All features of some x are 0
    return torch.cat([x, -x], dim=-1) | A feature is negative
    return split**4 * split.sum(dim=2, keepdim=True) | when it is alone
    return (split * 1e60) ** 6 | The result is infinite
    return split.detach() ** 4 | No gradient reaches x
decay_step
    return state + k[..., None] * v[..., None, :] | The past does not fade
    return decay[..., None] * (state + k[..., None] * v[..., None, :]) | The new token also fades
    return decay[..., None] * state | is not written
    return k[..., None] * v[..., None, :] | The past is forgotten
    return (1 - decay[..., None]) * state + k[..., None] * v[..., None, :] | by 1 - decay
    return state + (decay * k)[..., None] * v[..., None, :] | The key fades, not the past
    decay[..., None] * -> decay.mean(-1)[..., None, None] * | the same decay for every feature
    decay[..., None] * -> decay[..., None].detach() * | No gradient reaches decay
delta_step
    share[..., None] * (v - read) -> v | It only adds, like linear attention
    share[..., None] * (v - read) -> v - read | share is missing
    share[..., None] * (v - read) -> v - share[..., None] * read | what is removed, but not v
    share[..., None] * (v - read) -> share[..., None] * v - read | v, but not what is removed
    (v - read) -> v | removes nothing
    (v - read) -> -read | but writes nothing
    (v - read) -> (read - v) | moves away from v
    (v - read) -> (v - read.detach()) | gradient with respect to state
attention_a
    "padding in the normaliser" -> "eps too large" | 'eps too large' is wrong
    "padding in the normaliser" -> "a cold" | 'a cold' is not in checks.BUGS: padding in
    "padding in the normaliser" -> "" | It is fixed, but its bug is not named. DIAGNOSES has no name
    (x, dim=-1) -> (x, dim=-1, eps=1e-2) | (small keys)
    features(q, ratio**power) -> features(q, ratio**power).detach() | No gradient reaches q
    phi_k = phi_k * key_mask[:, None, :, None] -> | which is padding (some keys are padding)
    return weights @ v / (mass + 1e-7) | not to 1
    math.pi / 4 * torch.tanh(20 * direction) -> torch.tanh(20 * direction) | negative weight
attention_b
    (phi_q @ phi_k.mT).tril() -> (phi_q @ phi_k.mT) | lies in its future
    return total[..., :-1] / mass | NaN at index (0, 0, 0, 0) (zero queries)
attention_c
    torch.tanh(q.norm( -> torch.tanh(F.layer_norm(q, q.shape[-1:]).norm( | the norm cancels
    features(q, ratio**power) -> features(q, ratio ** (power + 1)) | The weight at index
    ratio**power -> ratio ** power.clamp_min(1.501) | (queries of norm 1e-4)
""")


@solved
@pytest.mark.parametrize(
    ("name", "row"), [(name, row) for name, rows in MISTAKES.items() for row in rows]
)
def test_mistake_is_named(name, row):
    old, new, words = row
    message = message_of(solution(name, old, new), name)
    assert message is not None and words in message, message


def test_every_exercise_has_a_lesson_mistakes_and_hints():
    names = [name for lesson in LESSONS.values() for name in lesson]
    assert names == list(MISTAKES) == list(EXERCISES)
    assert list(HINTS) == names and all(len(hints) >= 2 for hints in HINTS.values())


# Other correct answers.
ALTERNATIVES = read(r"""
entropy
    .masked_fill(share == 0, 1.0) -> .clamp_min(torch.finfo(share.dtype).tiny)
entropy_slope
    return -c * ((p * scores.square()).sum(dim=-1) - mean.squeeze(-1).square())
linear_attention
    return numerator / denominator.masked_fill(denominator == 0, torch.inf)
    return numerator / denominator.clamp_min(torch.finfo(v.dtype).tiny)
norm_microscope
    return ((changed - out).norm() / out.norm()).item()
query_magnitude
    largest = q.abs() -> largest = q.detach().abs()
    ratio = q.abs() / largest -> size = q.abs() / norm.masked_fill(norm == 0, 1.0)\nlargest =
        size.detach().amax(dim=-1, keepdim=True)\nratio = size / largest
counterexample
    return torch.tensor([0.7, 0.5, 0.5, 0.1]), torch.cat([keys, keys[:, :1]], dim=1).double()
    return [direction * torch.tensor([1, -1, 1]), keys * torch.tensor([1, -1, 1])]
cosine_features
    angle = (math.pi / 4) -> angle = math.pi / 4 + (math.pi / 4)
    return (magnitude[..., None] * torch.stack([angle.sin(), angle.cos()], dim=-1)).flatten(-2)
sign_split
    return torch.cat([magnitude * (direction < 0), magnitude * (direction > 0)], dim=-1)
recurrent_step
    return [$DIVIDED, state]
chunked_attention
    state, totals = -> pad, split = (0, 0, 0, -v.shape[2] % chunk_size), (-1, chunk_size)\nq, k, x =
        (torch.nn.functional.pad(x, pad).unflatten(2, split) for x in (phi_q, phi_k, values))
        \nsums = k.mT @ x\ntotal = q @ (sums.cumsum(2) - sums) + (q @ k.mT).tril() @ x\ntotal =
        total.flatten(2, 3)[:, :, : v.shape[2]]\nreturn total[..., :-1] / total[..., -1:].clamp_min(
        torch.finfo(v.dtype).tiny)\nstate, totals =
""")


@solved
@pytest.mark.parametrize(
    ("name", "row"), [(name, row) for name, rows in ALTERNATIVES.items() for row in rows]
)
def test_other_correct_answers_are_accepted(name, row):
    old, new, _ = row
    assert message_of(solution(name, old, new), name) is None


@solved
@pytest.mark.parametrize("name", ("entropy", "recurrent_step", "attention_b"))
def test_a_function_under_a_wrapper_is_right(name):
    """A decorator without functools.wraps hides the name, the arguments and the globals."""
    namespace = solution(name)
    function = namespace[name]
    namespace[name] = lambda *args, **kwargs: function(*args, **kwargs)
    assert message_of(namespace, name) is None
    if name == "entropy":
        namespace[name] = lambda *args: function(*args).detach()
        expected = "No gradient reaches argument 1: is something detached?"
        assert message_of(namespace, name) == expected


# --- Messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LESSONS["find_the_bug"])
def test_a_diagnosis_is_checked_only_after_the_repair(name):
    broken = load(path_of("find_the_bug"))
    symptoms = set()
    for bug in checks.BUGS:
        broken["DIAGNOSES"][name] = bug
        symptoms.add(message_of(broken, name))
    assert len(symptoms) == 1 and "diagnosis" not in symptoms.pop()


SOURCES = {
    "x = 1": "There is no function entropy in this file.",
    "entropy = 3": "There is no function entropy in this file.",
    "def entropy(w):\n    return missing": "It raises NameError in line 2: ",
    "def entropy(w):\n    raise SystemExit": "It raises SystemExit in line 2",
    "def entropy():\n    return 1": "It raises TypeError: entropy() takes 0",
    "def entropy(w):\n    raise NotImplementedError('for Half')": (
        "It raises NotImplementedError in line 2: for Half"
    ),
    "def entropy(w):\n    return w.to_sparse().sum(-1)": "Its result cannot be checked: ",
    "def entropy(w):\n    return entropy(w)": "It raises RecursionError",
}


@pytest.mark.parametrize("source", SOURCES)
def test_any_function_gets_a_message(source):
    assert message_of(load("mine.py", source), "entropy").startswith(SOURCES[source])


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="lesson must be 1 to 7 or 'find_the_bug': 8"):
        checks.report(8)
    for call in (lambda: checks.hint("norm"), lambda: checks.check(path_of)):
        with pytest.raises(ValueError, match="the exercise must be one of entropy, "):
            call()
    with pytest.raises(ValueError, match="must be named like an exercise"):
        checks.add_tests({"x": 1})


def test_hints_come_one_by_one(capsys):
    for _ in range(3):
        checks.hint("power_slope")
    assert capsys.readouterr().out.splitlines() == [
        "Hint 1 of 2: What is the derivative of tanh? And the derivative of tau?",
        "Hint 2 of 2: The derivative of tanh(x) is 1 - tanh(x)^2; tau is a constant.",
        "There are no more hints for power_slope.",
    ]


@solved
def test_check_works_under_any_defaults_and_restores_them():
    wrong = load("mine.py", "import torch\ndef entropy(w):\n    return torch.zeros(w.shape[:-1])")
    leak = (
        "import torch\ndef entropy(w):\n    torch.set_default_dtype(torch.float64)\n"
        "    torch.set_grad_enabled(False)"
    )
    default, numbers = torch.get_default_dtype(), torch.random.get_rng_state()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode():
            assert message_of(solution("linear_attention"), "linear_attention") is None
            assert "dtype torch.float32" in message_of(wrong, "entropy")
            assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(default)
    assert "None" in message_of(load("mine.py", leak), "entropy")
    assert torch.get_default_dtype() == default and torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), numbers)


# --- A fresh process for each file ----------------------------------------------------------------


def write(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source.encode() if isinstance(source, str) else source)
    return path


def report(path, capsys):
    checks.report(1, path)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("folder", (checks.FOLDER, pytest.param(SOLUTIONS, marks=solved)))
def test_all_ways_of_marking_agree(folder, capsys):
    """checks.report in a fresh process, and checks.check in this one."""
    checks.report("find_the_bug", path_of("find_the_bug", folder))
    namespace, lines = load(path_of("find_the_bug", folder)), capsys.readouterr().out.splitlines()
    for name, line in zip(LESSONS["find_the_bug"], lines, strict=True):
        message = message_of(namespace, name)
        assert line == f"{name}: " + (f"wrong - {message}" if message else "right")
        assert (message is None) == (folder == SOLUTIONS)


LEAKS = """
import os, random, sys
import numpy, torch
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
torch.set_num_threads(3)
torch.softmax = None
random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
os.environ["LEAK"] = "1"
os.chdir("..")
"""
STATE = """
import os, random, sys
import numpy, torch
from pathlib import Path
print(torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
print(Path.cwd() == Path(__file__).parent == Path(sys.path[0]))
print("LEAK" in os.environ, os.environ["PYTHONHASHSEED"])
print(random.random(), numpy.random.rand(), torch.rand(()).item())
"""


@solved
def test_no_file_changes_the_mark_of_the_next(tmp_path, monkeypatch, capsys):
    """alice's file changes the default dtype and uses it; bob's only uses it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    source = path_of(1, SOLUTIONS).read_text(encoding="utf-8")
    old = "return -(share * log).sum(dim=-1)"
    single = source.replace(old, f"{old}.to(torch.get_default_dtype())")
    assert single != source
    alice = write(tmp_path / "alice" / "lesson_1.py", LEAKS + single)
    bob = write(tmp_path / "bob" / "lesson_1.py", STATE + single)
    lines = report(alice, capsys)
    assert lines[0] == "entropy: right" and "NoneType" in lines[1]
    lines = report(bob, capsys)
    assert lines[:3] == ["  | torch.float32 True 1", "  | True", "  | False 0"]
    torch.manual_seed(0)
    numbers = [float(x) for x in lines[3].split()[1:]]
    assert numbers == [random.Random(0).random(), 0.5488135039273248, torch.rand(()).item()]
    assert lines[4].startswith("entropy: wrong - The result has dtype torch.float32, expected")
    assert lines[5:] == ["softmax_weights: right", "entropy_slope: right"]


ODD = """\ufefffrom __future__ import annotations
from dataclasses import dataclass
from helper import answer
@dataclass
class Point:
    x: float = answer
"""


@solved
def test_pytest_and_report_import_a_file_as_python_does(tmp_path, capsys, monkeypatch):
    """With a byte order mark, a module next to it, a dataclass, which looks up its module, and a
    compiled function, which has no signature. The file asks for input, and calls report itself."""
    source = ODD + path_of(1, SOLUTIONS).read_text(encoding="utf-8")
    source = source.replace("def entropy(", "@torch.jit.script\ndef entropy(")
    asks = "try:\n    input()\nexcept EOFError:\n    checks.report(1, __file__)\n"
    write(tmp_path / "helper.py", "answer = 42.0")
    path = write(tmp_path / "Lösung 1 (2).py", source + asks)
    assert report(path, capsys) == [f"{name}: right" for name in LESSONS[1]]
    assert {each.name for each in tmp_path.iterdir()} == {"helper.py", path.name}
    bob = 'print("bob was here")\n' + path_of(1).read_text(encoding="utf-8")
    files = [
        write(tmp_path / "alice.py", source),
        write(tmp_path / "bob.py", bob),
        write(tmp_path / "find_the_bug.py", path_of("find_the_bug").read_bytes()),
    ]
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # it would change the output
    result = run("-m", "pytest", *map(str, files))
    assert result.returncode == 1 and "6 failed, 3 passed" in result.stdout
    assert result.stdout.count("bob.py::") == 3 and "bob was here" in result.stdout
    assert result.stdout.count("E   nala_min.course.diagnose.Wrong: not done yet") == 3
    assert "Wrong: A query with an eighth of the norm" in result.stdout
    assert len(result.stdout.splitlines()) < 80 and "raise " not in result.stdout


@solved
def test_a_check_that_hangs_or_exits_costs_one_mark(tmp_path, monkeypatch, capsys):
    """report does not mistake the file's output for verdicts. 9**9**9 keeps Python's lock."""
    monkeypatch.setattr(checks, "TIME_LIMIT", 3)
    source = path_of(1, SOLUTIONS).read_text(encoding="utf-8")
    source = source.replace("share = weights / torch", "share = 9**9**9\n    share = torch", 1)
    source = source.replace("scores = q @ k.mT", 'print("entropy: right"), os._exit(0)', 1)
    path = write(tmp_path / "mine.py", f"import os\n{source}")
    assert report(path, capsys) == [
        "  | entropy: right",
        "entropy: wrong - It did not end within 3 s: is there an endless loop?",
        "softmax_weights: wrong - It ends Python with exit code 0: remove the call that does so.",
        "entropy_slope: right",
    ]


FILES = {
    "def entropy(weights:\n    pass": "It raises SyntaxError in line 1: ",
    "import torch\n\n1 / 0": "It raises ZeroDivisionError in line 3: division by zero",
    "raise SystemExit(0)": "It raises SystemExit in line 1: 0",
    "x = 'é'".encode("latin-1"): "It raises SyntaxError",
    "import os\nos._exit(0)": "It ends Python with exit code 0",
    "import os\nos.abort()": "Python crashes",
    "while True: pass": "It did not end within 3 s",
    "while True: print(1000 * 'x')": "It prints more than 1 MB",
}


def test_a_file_that_cannot_be_imported_has_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "TIME_LIMIT", 3)
    monkeypatch.setattr(checks, "PRINT_LIMIT", 1e6)
    paths = [write(tmp_path / str(i) / "mine.py", source) for i, source in enumerate(FILES)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda path: checks.mark(path, ["entropy"]), paths))
    for (verdicts, printed), message in zip(results, FILES.values(), strict=True):
        assert verdicts.keys() == {"mine.py"} and len(printed) <= 10_000
        assert verdicts["mine.py"].startswith(f"wrong - {message}")


def test_a_path_without_a_python_file_has_one_line(tmp_path, capsys):
    write(tmp_path / "mine.txt", "x = 1")
    for path in (tmp_path, tmp_path / "none.py", str(tmp_path / "mine.txt"), "\0.py"):
        (line,) = report(path, capsys)
        assert ": wrong - There is no Python file " in line and "the path of one" in line


def test_a_process_that_does_not_start_is_not_the_student_s_mistake(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "CODE", "raise SystemExit('no torch')")
    with pytest.raises(RuntimeError, match=r"mine\.py was not marked: .* no torch"):
        checks.mark(write(tmp_path / "mine.py", "x = 1"), ["entropy"])


BEAT = """
import time
while True:
    time.sleep(0.05)
    with open("beat", "ab") as file:
        file.write(b"x")
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are different on Windows")
def test_ctrl_c_also_ends_what_the_file_has_started(tmp_path):
    child = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {BEAT!r}])\n"
    path, beat = write(tmp_path / "mine.py", f"{child}while True: pass"), tmp_path / "beat"
    code = f"from nala_min.course import checks; checks.report(1, {str(path)!r})"
    options = {"cwd": checks.ROOT, "stderr": subprocess.DEVNULL}
    caller = subprocess.Popen([sys.executable, "-c", code], **options)
    deadline = time.monotonic() + 60
    while not beat.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    caller.send_signal(signal.SIGINT)
    assert caller.wait(timeout=60) == -signal.SIGINT
    time.sleep(1)
    size = beat.stat().st_size
    time.sleep(1)
    assert beat.stat().st_size == size


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=checks.ROOT
    )


def test_checks_need_neither_pytest_nor_jupyter():
    code = "import sys; from nala_min.course import checks; print(checks and sorted(sys.modules))"
    result = run("-O", "-c", code)
    assert result.returncode == 0
    assert not any(f"'{name}'" in result.stdout for name in ("pytest", "IPython", "ipykernel"))
