"""Runs model.py and checks its shape comments. A comment such as `# (B, H, N, F)` at the end of a
statement gives the shape of its result."""

import ast
import inspect
import io
import re
import sys
import tokenize

import pytest
import torch

from nala_min import model

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


COMMENTS = shape_comments(inspect.getsource(model))


def results(node, frame, returned):
    """The results of a statement in frame: the values of its targets, or what it returned."""
    if isinstance(node, ast.Return):
        return returned if isinstance(returned, tuple) else (returned,)
    (target,) = node.targets if isinstance(node, ast.Assign) else (node.target,)
    targets = target.elts if isinstance(target, ast.Tuple) else [target]
    targets = [x.value if isinstance(x, ast.Starred) else x for x in targets]
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
            if shape is not None:
                reached.add(first)
                if not fits(shape, comment, sizes):
                    errors.append(f"line {first}: {comment} is {shape} at {sizes}")
    return errors + [f"line {line}: never reached" for line in comments.keys() - reached]


def measure(run, sizes):
    """Trace run(sizes). Returns for each commented statement that ran: its first line, the shapes
    of its results (None if not a tensor) and sizes."""
    statement_at, measured = {}, []
    for first, (node, _) in COMMENTS.items():
        statement_at |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), first)

    def trace_call(frame, event, _):
        if frame.f_code.co_filename != model.__file__ or frame.f_code.co_name[0] == "<":
            return None  # another file, or a generator within a statement
        pending = None  # the statement that is running

        def trace_line(frame, event, value):
            nonlocal pending
            current = statement_at.get(frame.f_lineno) if event == "line" else None
            if pending is not None and current != pending:
                node, _ = COMMENTS[pending]
                if event == "return" or not isinstance(node, ast.Return):
                    values = results(node, frame, value)
                    shapes = [tuple(x.shape) if torch.is_tensor(x) else None for x in values]
                    measured.append((pending, shapes, sizes))
                pending = None
            pending = current if event == "line" else pending
            return trace_line

        return trace_line

    before = sys.gettrace()
    sys.settrace(trace_call)
    try:
        with torch.no_grad():
            run(sizes)
    finally:
        sys.settrace(before)
    return measured


# --- Each scenario gives every letter a size, different ones where the comments allow it ----------

SIZES = {"B": 2, "H": 4, "N": 13, "D": 10, "M": 7, "C": 3, "T": 5}


def attention_scenario(attention, **options):
    """Attention. If it is not causal, there are more keys than queries."""
    sizes = SIZES | {"K": SIZES["N"] if "causal" in options else 17, "F": 2 * SIZES["D"]}
    sizes["F"] = sizes["D"] if attention in ("elu", "relu") else sizes["F"]
    if options.get("mode") == "quadratic":  # one chunk
        sizes |= {"C": sizes["N"], "T": 1}

    def run(sizes):
        q, k, v = (torch.randn([sizes[x] for x in names]) for names in ("BHND", "BHKD", "BHKM"))
        mask = torch.rand(sizes["B"], sizes["K"]) > 0.3
        model.ATTENTIONS[attention](q, k, v, key_mask=mask, **options)

    return run, sizes


def weights_scenario():
    """Attention weights: the values have as many channels as there are tokens."""

    def run(sizes):
        q, k = (torch.randn([sizes[x] for x in names]) for names in ("BHND", "BHKD"))
        model.entropy(model.attention_weights(q, k))

    return run, SIZES | {"K": 17, "M": 17, "F": 20}


def lm_scenario(attention):
    """The language model: M equals D, and K equals N."""

    def run(sizes):
        options = {"vocab_size": sizes["V"], "num_heads": sizes["H"], "dim": sizes["E"]}
        config = model.Config(num_layers=1, attention=attention, conv_size=sizes["W"], **options)
        prompt = torch.randint(sizes["V"], (sizes["B"], sizes["N"]))
        model.NaLaLM(config).generate(prompt, 1, top_k=4)
        model.NaLaLM(config).generate(prompt, 1, temperature=0)

    sizes = {"B": 2, "H": 3, "N": 13, "K": 13, "D": 6, "M": 6, "E": 18, "V": 17, "W": 5, "F": 12}
    return run, sizes


def vit_scenario(attention):
    """The image model: the last patches of both axes are incomplete."""

    def run(sizes):
        options = {"num_classes": sizes["Y"], "num_heads": sizes["H"], "dim": sizes["E"]}
        config = model.Config(num_layers=1, attention=attention, patch_size=2, **options)
        images = torch.randn(sizes["B"], 3, 2 * sizes["R"] - 1, 2 * sizes["P"] - 1)
        model.NaLaViT(config)(images)

    sizes = {"B": 2, "H": 3, "D": 8, "M": 8, "E": 24, "W": 7, "F": 16, "Y": 11, "R": 4, "P": 5}
    return run, sizes | {"N": 20, "K": 20}


CHUNKED = {"causal": True, "mode": "chunked", "chunk_size": 3, "return_state": True}
SCENARIOS = [
    *(attention_scenario(name, mode="parallel") for name in ("nala", "split", "elu", "relu")),
    attention_scenario("softmax"),
    attention_scenario("nala", **CHUNKED),
    attention_scenario("elu", **CHUNKED),
    attention_scenario("nala", causal=True, mode="quadratic"),
    attention_scenario("nala", causal=True, mode="recurrent", return_state=True),
    weights_scenario(),
    *(scenario(x) for scenario in (lm_scenario, vit_scenario) for x in ("nala", "softmax")),
]


@pytest.fixture(scope="module")
def measured():
    return [x for run, sizes in SCENARIOS for x in measure(run, sizes)]


def test_every_shape_comment_is_true(measured):
    assert len(COMMENTS) > 40
    assert wrong_shape_comments(COMMENTS, measured) == []


def test_a_wrong_shape_comment_is_found(measured):
    """If the last size of one comment changes, only that comment must be reported."""
    for line, (node, shapes) in COMMENTS.items():
        wrong = [*shapes[:-1], shapes[-1][:-1] + " + 100)"]
        errors = wrong_shape_comments(COMMENTS | {line: (node, wrong)}, measured)
        assert {error.partition(":")[0] for error in errors} == {f"line {line}"}
