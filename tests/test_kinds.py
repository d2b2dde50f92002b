"""The table of kinds of faults in tests/README.md is up to date, and its tests exist."""

import pytest
from kinds import BEGIN, END, KINDS, README, TESTS, table


@pytest.mark.parametrize("kind", KINDS)
def test_every_test_of_a_kind_exists(kind):
    for name in KINDS[kind].split():
        file, test = name.split("::")
        assert f"def {test}" in (TESTS / file).read_text(encoding="utf-8"), name


def test_the_table_has_every_kind():
    assert README.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0] == table()
