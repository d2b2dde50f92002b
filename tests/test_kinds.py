"""The table of kinds of faults in tests/README.md: of tests that exist, without a failure."""

from collections import Counter

import pytest
from kinds import BEGIN, END, KINDS, README, TESTS, row


@pytest.mark.parametrize("kind", KINDS)
def test_every_test_of_a_kind_exists(kind):
    for name in KINDS[kind].split():
        file, test = name.split("::")
        assert f"def {test}" in (TESTS / file).read_text(encoding="utf-8"), name


def test_the_table_has_every_kind_and_no_failure():
    table = README.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].splitlines()[2:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table] == list(KINDS)
    for line, kind in zip(table, KINDS, strict=True):
        assert line.rsplit(" | ", 1)[0] == row(kind, {}).rsplit(" | ", 1)[0]
        assert " passed" in line and "failed" not in line and "error" not in line


def test_a_row_counts_the_cases_of_its_own_tests():
    kind = "top_k keeps every tie"
    name = KINDS[kind].strip()
    counts = Counter(
        {(name, "passed"): 2, (name, "failed"): 1, ("test_model.py::test_x", "passed"): 5}
    )
    assert row(kind, counts).endswith("| 1 failed, 2 passed |")
