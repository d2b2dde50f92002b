"""What nala_min/bench.py measures; that a second is a second is not tested here."""

import pytest
import torch
from torch.testing import assert_close

from nala_min import bench, plots, runcard

CARD = runcard.read_json(runcard.RESULTS / "time_against_length.json")


def test_every_form_is_causal_attention_and_those_of_nala_are_equal():
    q, k, v = torch.randn(3, 1, 2, 70, 8, dtype=torch.float64)
    outs = {name: form(q, k, v) for name, (form, _) in bench.FORMS.items()}
    assert_close(outs["chunked"], outs["quadratic"])
    v[:, :, -1] += 1
    for name, (form, _) in bench.FORMS.items():
        assert_close(form(q, k, v)[:, :, :-1], outs[name][:, :, :-1])
        assert not torch.equal(form(q, k, v)[:, :, -1], outs[name][:, :, -1])


def test_measure_time_takes_each_form_up_to_its_longest_text(monkeypatch):
    calls = []

    def form(name):
        return lambda q, k, v: (calls.append((name, q.shape)), q * k * v)[1]

    monkeypatch.setattr(bench, "FORMS", {"a": (form("a"), 8), "b": (form("b"), 4)})
    seconds = bench.measure_time([4, 8], heads=2, dim=3, repeats=2)
    assert all(s > 0 for s in [*seconds["a"], seconds["b"][0]]) and seconds["b"][1] is None
    short = [(name, (1, 2, 4, 3)) for name in ("a", "b")] * 3  # in turns, one of them to warm up
    assert calls == short + [("a", (1, 2, 8, 3))] * 3


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [
        ([1, 2, 4], [2, 2, 2], 20),
        ([1, 2, 4], [0, 0, 0], 10),
        ([1, 2, 4], [9, 9, 9], None),
        ([3, 1, 4], [2, 2, 2], 40),  # for good, not for once
    ],
)
def test_crossover_is_where_the_second_stays_the_faster(first, second, length):
    assert bench.crossover([10, 20, 40], first, second) == length


def test_the_committed_card_is_consistent():
    results = CARD["results"]
    assert CARD["command"] == "python -m nala_min.bench"
    assert set(results["seconds"]) == set(bench.FORMS)
    for name, (_, longest) in bench.FORMS.items():
        measured = zip(results["lengths"], results["seconds"][name], strict=True)
        assert all((length > longest) == (s is None) for length, s in measured)
    times = results["seconds"]["softmax"], results["seconds"]["chunked"]
    assert results["crossover"] == bench.crossover(results["lengths"], *times)


def test_the_picture_marks_the_crossover():
    axes = plots.time_against_length(CARD["results"]).axes[0]
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels[:3] == ["softmax, fused kernel", "NaLa, chunked (15)", "NaLa, quadratic (13c)"]
    (note,) = [text.get_text() for text in axes.texts]
    assert f"{CARD['results']['crossover']:,}" in note
    shown = axes.get_lines()[0].get_ydata()
    assert list(shown) == pytest.approx([1000 * s for s in CARD["results"]["seconds"]["softmax"]])
    nowhere = plots.time_against_length(CARD["results"] | {"crossover": None}).axes[0]
    assert not nowhere.texts
