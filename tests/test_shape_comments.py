"""Runs model.py and checks its shape comments. A comment such as `# (B, H, N, F)` at the end of a
statement gives the shape of its result."""

import ast
import inspect
import io
import math
import re
import sys
import tokenize

import pytest
import torch
from mutants import SOURCE

import nala_min.model

SHAPE = re.compile(r"\([^()]*,[^()]*\)")  # "(B, N)" and "(..., 1)", not "(13)" or "(B)"
TAIL = re.compile(rf"#( .*:)? *({SHAPE.pattern})(, {SHAPE.pattern})*$")  # optionally after words
STATEMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return)


def shape_comments(source):
    """{first line of a statement: (statement, shapes)} for statements with a shape comment."""
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, STATEMENTS)]
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and TAIL.match(token.string):
            (node,) = (node for node in statements if node.end_lineno == token.start[0])
            comments[node.lineno] = (node, SHAPE.findall(token.string))
    return comments


def results(node, frame, returned):
    """The results of a statement in frame: the values of its targets, or what it returned."""
    if isinstance(node, ast.Return):
        return returned if isinstance(returned, tuple) else (returned,)
    (target,) = node.targets if isinstance(node, ast.Assign) else (node.target,)
    targets = target.elts if isinstance(target, ast.Tuple) else [target]
    return [eval(ast.unparse(target), frame.f_globals, frame.f_locals) for target in targets]


def fits(shape, comment, sizes):
    """Whether a shape matches a comment, given the sizes of its letters."""
    names = [name.strip() for name in comment[1:-1].split(",") if name.strip()]
    expected = [eval(name, {}, sizes) for name in names if name != "..."]
    if names[0] == "...":
        return len(expected) <= len(shape) and list(shape[len(shape) - len(expected) :]) == expected
    return list(shape) == expected


def wrong_shape_comments(comments, measured):
    """A message for each shape that contradicts its comment, and for each comment never reached."""
    errors, reached = [], set()
    for first, actual_shapes, sizes in measured:
        _, shapes = comments[first]
        shapes = shapes * len(actual_shapes) if len(shapes) == 1 else shapes
        if len(shapes) != len(actual_shapes):
            errors.append(f"line {first}: {len(shapes)} shapes for {len(actual_shapes)} values")
        for shape, comment in zip(actual_shapes, shapes, strict=False):
            if shape is None:
                continue
            reached.add(first)
            if not fits(shape, comment, sizes):
                errors.append(f"line {first}: {comment} is {shape} at {sizes}")
    return errors + [f"line {line}: never reached" for line in comments.keys() - reached]


def measure(module, run, sizes, comments):
    """Trace run(module). Returns for each commented statement that ran: its first line, the shapes
    of its results (None if not a tensor) and sizes."""
    statement_at = {
        line: first
        for first, (node, _) in comments.items()
        for line in range(node.lineno, node.end_lineno + 1)
    }
    measured = []

    def record(frame, first, returned):
        values = results(comments[first][0], frame, returned)
        shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else None for x in values]
        if (first, shapes, sizes) not in measured:
            measured.append((first, shapes, sizes))

    def trace_call(frame, event, _):
        code = frame.f_code
        if code.co_filename != inspect.unwrap(module.cosine_map).__code__.co_filename or (
            code.co_name[0] == "<"
        ):
            return None  # another file, or a generator within a statement
        pending = None  # the statement that is running

        def trace_line(frame, event, value):
            nonlocal pending
            current = statement_at.get(frame.f_lineno) if event == "line" else None
            if pending is not None and current != pending:
                if event == "return" or not isinstance(comments[pending][0], ast.Return):
                    record(frame, pending, value)
                pending = None
            pending = current if event == "line" else pending
            return trace_line

        return trace_line

    before = sys.gettrace()
    with torch.no_grad():
        run(module)  # so fast.py has verified these kinds of calls before the trace
    sys.settrace(trace_call)
    try:
        with torch.no_grad():
            run(module)
    finally:
        sys.settrace(before)
    return measured


def attention_scenario(feature_map, **options):
    """Attention, with a different size for every letter."""
    sizes = {"B": 2, "H": 4, "N": 13, "D": 10, "M": 7, "C": 3, "T": 5}
    sizes["F"] = sizes["D"] if feature_map in ("elu", "relu") else 2 * sizes["D"]
    mask = torch.rand(sizes["B"], sizes["N"]) > 0.3

    def run(module):
        q, k = torch.randn(2, *(sizes[name] for name in "BHND"))
        v = torch.randn(*(sizes[name] for name in "BHNM"))
        if feature_map == "softmax":
            module.softmax_attention(q, k, v, key_mask=mask, **options)
        else:
            module.nala_attention(q, k, v, feature_map=feature_map, key_mask=mask, **options)

    return sizes, run


def weights_scenario():
    """Attention weights: the values have as many channels as there are tokens."""
    sizes = {"B": 2, "H": 4, "N": 13, "D": 10, "M": 13, "F": 20}

    def run(module):
        q, k = torch.randn(2, *(sizes[name] for name in "BHND"))
        module.entropy(module.attention_weights(q, k))

    return sizes, run


def lm_scenario(**options):
    """The language model: M equals D, and a text is one chunk."""
    sizes = {"B": 2, "H": 3, "N": 13, "D": 6, "M": 6, "E": 18, "V": 17, "W": 5, "F": 12}
    sizes |= {"T": 1, "C": 64, "A": 1}
    prompt = torch.randint(sizes["V"], (sizes["B"], sizes["N"]))

    def run(module):
        config = module.Config(
            vocab_size=sizes["V"],
            num_layers=1,
            num_heads=sizes["H"],
            dim=sizes["E"],
            conv_size=sizes["W"],
            **options,
        )
        module.NaLaLM(config).generate(prompt, 1, top_k=4)
        module.NaLaLM(config).generate(prompt, 1, temperature=0)

    return sizes, run


def vit_scenario(**options):
    """The image model: patches have two axes, and the last ones are incomplete."""
    sizes = {"B": 2, "H": 3, "D": 8, "M": 8, "E": 24, "W": 7, "F": 16, "Y": 11}
    sizes |= {"R": 4, "S": 5, "N": 20, "A": 2, "P": 2}
    height, width = (sizes["P"] * sizes[name] - 1 for name in "RS")
    images = torch.randn(sizes["B"], 3, height, width)

    def run(module):
        config = module.Config(
            num_classes=sizes["Y"],
            num_layers=1,
            num_heads=sizes["H"],
            dim=sizes["E"],
            conv_size=sizes["W"],
            patch_size=sizes["P"],
            **options,
        )
        module.NaLaViT(config)(images)

    return sizes, run


CHUNKED = {"causal": True, "mode": "chunked", "chunk_size": 3, "return_state": True}
SCENARIOS = [
    *(attention_scenario(name, mode="parallel") for name in ("cosine", "split", "elu", "relu")),
    attention_scenario("softmax"),
    *(attention_scenario(name, **CHUNKED) for name in ("cosine", "elu")),
    attention_scenario("cosine", causal=True, mode="quadratic"),
    attention_scenario("cosine", causal=True, mode="recurrent", return_state=True),
    attention_scenario("cosine", **CHUNKED, rope_positions=torch.arange(13)[:, None]),
    weights_scenario(),
    lm_scenario(),
    lm_scenario(norm_scale=None),
    lm_scenario(rope="numerator"),
    lm_scenario(attention="softmax"),
    vit_scenario(),
    vit_scenario(norm_scale=None),
    vit_scenario(rope="numerator"),
    vit_scenario(attention="softmax"),
]


COMMENTS = shape_comments(SOURCE)


@pytest.fixture(scope="module")
def measured():
    """Measured once: the tests change only comments."""
    return [x for sizes, run in SCENARIOS for x in measure(nala_min.model, run, sizes, COMMENTS)]


def test_every_shape_comment_is_true(measured):
    assert len(COMMENTS) > 50
    assert wrong_shape_comments(COMMENTS, measured) == []


@pytest.mark.parametrize("line", sorted(COMMENTS))
def test_a_wrong_shape_comment_is_found(line, measured):
    """If the last size of one comment changes, only that comment must be reported."""
    node, shapes = COMMENTS[line]
    wrong = [*shapes[:-1], shapes[-1][:-1] + " + 100)"]
    errors = wrong_shape_comments(COMMENTS | {line: (node, wrong)}, measured)
    assert errors
    assert {error.partition(":")[0] for error in errors} == {f"line {line}"}


def test_letters_have_different_sizes():
    """Otherwise (B, H) could pass for (H, B), or (B, R, S, E) for (B, S, R, E)."""
    sizes, _ = attention_scenario("cosine")
    assert len(set(sizes.values())) == len(sizes)
    assert math.ceil(sizes["N"] / sizes["C"]) == sizes["T"]
    sizes, _ = vit_scenario()
    distinct = [sizes[name] for name in "BHNDEWFYRS"]
    assert len(set(distinct)) == len(distinct)
    assert sizes["N"] == sizes["R"] * sizes["S"]
