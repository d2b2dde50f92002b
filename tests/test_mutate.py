"""The mutants of mutate.py: which ones a module gets, and that each is one effective change."""

import ast
import sys

import mutate
import pytest
from mutate import EQUIVALENT, MODEL, ROOT, TESTS, OrderPlugin, diff, make_mutants

EXAMPLE = '''"""Not a mutant."""
import torch

@torch.no_grad()
def shrink(x: int, by: float = 0.5, *, name: str = "ä") -> int:
    """Nor this: 1 + 1."""
    if not x < 2 and name != "ü":
        words = f"{x + 1}"
        raise ValueError(f"{words} + 1")
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


@pytest.fixture(scope="module")
def model_text():
    return (ROOT / MODEL).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def mutants(model_text):
    return make_mutants(model_text)


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


def test_mutants_of_the_model(model_text, mutants):
    """There are many, with unique keys and texts, and they compile."""
    assert len(mutants) > 500
    assert len({mutant.key for mutant in mutants}) == len({x.text for x in mutants}) == len(mutants)
    assert model_text not in {mutant.text for mutant in mutants}
    for mutant in mutants[::20]:
        compile(mutant.text, MODEL, "exec")


def test_equivalent_mutants_exist_and_have_a_reason(mutants):
    assert EQUIVALENT.keys() <= {mutant.key for mutant in mutants}
    assert all(EQUIVALENT.values())


def test_the_tests_that_run_exist():
    assert all((ROOT / name).is_file() for name in TESTS)


def test_tests_that_caught_a_mutant_come_first_then_one_case_of_each():
    class Item:
        def __init__(self, function, case):
            self.function, self.nodeid = function, function + case

    items = [Item(function, case) for function in "ab" for case in "123"]
    OrderPlugin(["b3", "gone"]).pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["b3", "a1", "b1", "a2", "b2", "a3"]


@pytest.mark.parametrize(
    ("flags", "message"), [("--out FILE/card.json", "cannot be written"), ("--jobs 0", "1 or more")]
)
def test_an_invalid_flag_is_reported_before_the_work(flags, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["mutate.py", *flags.split()])
    monkeypatch.setattr(mutate, "make_mutants", lambda text: pytest.fail("started the work"))
    before = list(sys.path)
    with pytest.raises(SystemExit, match="2"):
        mutate.main()
    assert message in capsys.readouterr().err
    assert sys.path == before  # the mutants' processes inherit it
