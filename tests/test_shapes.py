"""Every shape comment of model.py is true: this runs model.py with sizes that tell the letters
apart. A comment such as `# (B, H, N, F)` gives the shape of its statement's result."""

import ast
import io
import re
import tokenize

import torch
from mutants import SOURCE, load_model

SHAPE = re.compile(r"\([^()]*,[^()]*\)")  # "(B, N)" and "(..., 1)", not "(13)" or "(B)"
TAIL = re.compile(rf"#( .*:)? *({SHAPE.pattern})(, {SHAPE.pattern})*$")  # optionally after words
COMMENTS = {  # the shapes of a comment, by its line
    token.start[0]: SHAPE.findall(token.string)
    for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline)
    if token.type == tokenize.COMMENT and TAIL.match(token.string)
}


class Recorded(ast.NodeTransformer):
    """Passes the results of statements that end with a comment to record(line, results)."""

    def visit(self, node):
        node = self.generic_visit(node)
        kinds = ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return
        if not isinstance(node, kinds) or node.end_lineno not in COMMENTS:
            return node
        if isinstance(node, ast.Return):
            call = f"return record({node.end_lineno}, {ast.unparse(node.value)})"
            return ast.parse(call).body
        target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        return [node, *ast.parse(f"record({node.end_lineno}, ({target}))").body]


def size_of(names, sizes):
    return [
        eval(name, {}, sizes) for name in names.strip("(,)").split(",") if name.strip() != "..."
    ]


# --- What to run, and the size of every letter: different ones where comments allow it ------------


def attend(model, sizes, attention, **options):
    q, k, v = (torch.randn([sizes[x] for x in names]) for names in ("BHND", "BHKD", "BHKM"))
    mask = torch.rand(sizes["B"], sizes["K"]) > 0.3
    model.ATTENTIONS[attention](q, k, v, key_mask=mask, **options)
    if sizes["M"] == sizes["K"]:
        model.entropy(model.attention_weights(q, k))


def generate(model, sizes, attention):
    options = {"num_layers": 1, "num_heads": sizes["H"], "dim": sizes["E"], "conv_size": sizes["W"]}
    lm = model.NaLaLM(model.Config(vocab_size=sizes["V"], attention=attention, **options))
    prompt = torch.randint(sizes["V"], (sizes["B"], sizes["N"]))
    lm.generate(prompt, 1, top_k=4)
    lm.generate(prompt, 1, temperature=0)


def classify(model, sizes, attention):
    """The last patches of both axes are incomplete."""
    options = {"num_layers": 1, "num_heads": sizes["H"], "dim": sizes["E"], "patch_size": 2}
    vit = model.NaLaViT(model.Config(num_classes=sizes["Y"], attention=attention, **options))
    vit(torch.randn(sizes["B"], 3, 2 * sizes["R"] - 1, 2 * sizes["P"] - 1))


SIZES = {"B": 2, "H": 4, "N": 13, "K": 17, "D": 10, "M": 7, "C": 3, "T": 5, "F": 20}
CAUSAL = SIZES | {"K": 13}
TEXT = {"B": 2, "H": 3, "N": 13, "K": 13, "D": 6, "M": 6, "E": 18, "V": 17, "W": 5, "F": 12}
TEXT |= {"C": 64, "T": 1}  # one chunk, padded
IMAGES = {"B": 2, "H": 3, "D": 8, "M": 8, "E": 24, "W": 7, "F": 16, "Y": 11, "R": 4, "P": 5}
IMAGES |= {"N": 20, "K": 20}
CHUNKED = {"causal": True, "mode": "chunked", "chunk_size": 3, "return_state": True}
RUNS = [
    *((attend, SIZES, name, {"mode": "parallel"}) for name in ("nala", "split")),
    *((attend, SIZES | {"F": 10}, name, {"mode": "parallel"}) for name in ("elu", "relu")),
    (attend, SIZES | {"M": 17}, "softmax", {}),
    (attend, CAUSAL, "nala", CHUNKED),
    (attend, CAUSAL | {"C": 13, "T": 1}, "nala", {"causal": True, "mode": "quadratic"}),
    (attend, CAUSAL, "nala", {"causal": True, "mode": "recurrent", "return_state": True}),
    *((generate, TEXT, name, {}) for name in ("nala", "softmax")),
    *((classify, IMAGES, name, {}) for name in ("nala", "softmax")),
]


def test_every_shape_comment_is_true():
    """And every one is reached."""
    reached = set()

    def record(line, results):
        values = results if isinstance(results, tuple) else (results,)
        comments = COMMENTS[line] * (len(values) if len(COMMENTS[line]) == 1 else 1)
        for value, comment in zip(values, comments, strict=True):
            if torch.is_tensor(value):
                reached.add(line)
                want = size_of(comment, sizes)
                start = value.ndim - len(want) if "..." in comment else 0
                assert list(value.shape[start:]) == want, f"line {line}: {comment}"
        return results

    model = load_model(ast.unparse(Recorded().visit(ast.parse(SOURCE))))
    model.record = record
    for run, sizes, attention, options in RUNS:
        run(model, sizes, attention, **options)
    assert reached == COMMENTS.keys() and len(reached) > 40
