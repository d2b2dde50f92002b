"""The mutants of mutate.py: which ones a module gets, and that each is one effective change."""

import ast

from mutate import EQUIVALENT, MODEL, ROOT, diff, make_mutants

EXAMPLE = '''"""Not a mutant."""
import torch

@torch.no_grad()
def shrink(x: int, by: float = 0.5, *, name: str = "ä") -> int:
    """Nor this: 1 + 1."""
    if not x < 2 and name != "ü":
        words = f"{x + 1}"
        raise ValueError(f"{words} + 1")
    require(x > 7, "x", "above 7", x)
    x -= 1  # 1 + 1
    y = (x) * torch.full(x, fill_value=-1, out=y).tril()
    return y if x in (y,) else min(y, by)
'''

EXPECTED = """
@torch.no_grad() ->
"ä" -> "XXä"
0.5 -> 1.0
not x < 2 and name != "ü" -> (not (not x < 2 and name != "ü"))
not x < 2 and name != "ü" -> not x < 2 or name != "ü"
not x < 2 -> x < 2
x < 2 -> x <= 2
2 -> 3
name != "ü" -> name == "ü"
"ü" -> "XXü"
raise ValueError(f"{words} + 1") -> pass
require(x > 7, "x", "above 7", x) -> pass
x > 7 -> x >= 7
x > 7 -> x > 8
"x" -> "XXx"
x -= 1 -> x += 1
x -= 1 -> pass
x -= 1 -> x -= 2
(x) * torch.full(x, fill_value=-1, out=y).tril() -> (x) / torch.full(x, fill_value=-1, out=y).tril()
torch.full(x, fill_value=-1, out=y).tril() -> torch.full(x, fill_value=-1, out=y).triu()
torch.full(x, fill_value=-1, out=y).tril() -> torch.full(x, fill_value=-1, out=y)
torch.full(x, fill_value=-1, out=y) -> torch.full(x, out=y)
torch.full(x, fill_value=-1, out=y) -> torch.full(x, fill_value=-1)
-1 -> 1
-1 -> -2
x in (y,) -> x not in (y,)
min(y, by) -> max(y, by)
"""


def test_mutants_of_an_example():
    """Not docstrings, annotations, comments, error messages or a name's only assignment."""
    keys = [mutant.key.removeprefix("shrink: ") for mutant in make_mutants(EXAMPLE)]
    assert [key.replace("`", "").rstrip() for key in keys] == EXPECTED.strip().splitlines()


def test_a_mutant_is_one_change_in_one_line_and_valid_python():
    for mutant in make_mutants(EXAMPLE):
        assert diff(EXAMPLE, mutant.text).count("\n") == 1
        old, new = EXAMPLE.splitlines(), mutant.text.splitlines()
        assert [
            i for i, pair in enumerate(zip(old, new, strict=True), 1) if pair[0] != pair[1]
        ] == [mutant.line]
        assert ast.dump(ast.parse(mutant.text)) != ast.dump(ast.parse(EXAMPLE))


def test_brackets_comments_and_strings_in_a_condition():
    """The operator is found between them, although ast counts columns in bytes."""
    source = 'y = ("ä" + (a)  # ä or\n    or (b)) is not c\n'
    texts = {mutant.text for mutant in make_mutants(source)}
    assert source.replace("\n    or", "\n    and") in texts
    assert source.replace("is not", "is") in texts
    assert source.replace("+", "-") in texts


def test_mutants_of_the_model():
    """There are many, with unique keys and texts. Those called equivalent exist, with a reason."""
    text = (ROOT / MODEL).read_text(encoding="utf-8")
    mutants = make_mutants(text)
    keys = {mutant.key for mutant in mutants}
    assert len(mutants) > 500
    assert len(keys) == len({x.text for x in mutants} - {text}) == len(mutants)
    assert EQUIVALENT.keys() <= keys and all(EQUIVALENT.values())
