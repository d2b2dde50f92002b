"""What nala_min/bench.py measures; that a second is a second is not tested here."""

import types

import pytest
import torch
from torch.testing import assert_close

from nala_min import bench, measure, plots, runcard

CARD = runcard.read_json(runcard.RESULTS / "time_against_length.json")


def test_every_form_is_causal_attention_and_those_of_nala_are_equal():
    q, k, v = torch.randn(3, 1, 2, 70, 8, dtype=torch.float64)
    outs = {name: form(q, k, v) for name, (form, _) in bench.FORMS.items()}
    assert_close(outs["chunked"], outs["quadratic"])
    v[:, :, -1] += 1
    for name, (form, _) in bench.FORMS.items():
        assert_close(form(q, k, v)[:, :, :-1], outs[name][:, :, :-1])
        assert not torch.equal(form(q, k, v)[:, :, -1], outs[name][:, :, -1])


def test_only_the_quadratic_form_holds_n_squared_numbers():
    peaks = {}
    for name in ("chunked", "quadratic"):
        with measure.Recorder() as recorder:
            bench.FORMS[name][0](*torch.randn(3, 1, 1, 512, 8))
        peaks[name] = recorder.peak
    assert peaks["chunked"] < 4 * 512**2 <= peaks["quadratic"]


def test_measure_time_is_the_median_of_forward_and_backward_passes(monkeypatch):
    """By a clock that stands still but in forms: it ticks in both passes, long in the first."""
    calls, now = [], [0.0]

    def form(name, *durations):
        steps = iter(durations)

        def attention(q, k, v):
            step = next(steps)

            def backward(gradient):
                calls.append(f"{name} backward")
                now[0] += step

            assert q.dtype == k.dtype == v.dtype == torch.float32
            calls.append((name, q.shape))
            now[0] += 10 * step
            out = q * k * v
            out.register_hook(backward)
            return out

        return attention

    ticks = (64.0, 1.0, 8.0, 2.0)  # to warm up, and three to take the median of
    forms = {"a": (form("a", *ticks, *ticks), 8), "b": (form("b", 64.0, 4.0, 5.0, 9.0), 4)}
    monkeypatch.setattr(bench, "FORMS", forms)
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    seconds = bench.measure_time([4, 8], heads=2, dim=3, repeats=3)
    assert seconds == {"a": [22.0, 22.0], "b": [55.0, None]}
    turn = [("a", (1, 2, 4, 3)), "a backward", ("b", (1, 2, 4, 3)), "b backward"]
    assert calls == 4 * turn + 4 * [("a", (1, 2, 8, 3)), "a backward"]


def test_main_writes_what_it_measured(monkeypatch, tmp_path):
    """With the settings of the committed card; softmax is overtaken at the third length."""
    asked = []

    def measure_time(lengths, **sizes):
        asked.append((lengths, sizes | {"seed": torch.initial_seed()}))
        return {
            "softmax": [0.001 * i for i, _ in enumerate(lengths, start=1)],
            "chunked": [0.0025] * len(lengths),
            "quadratic": [0.01] * (len(lengths) - 1) + [None],
        }

    monkeypatch.setattr(bench, "measure_time", measure_time)
    monkeypatch.setattr(runcard, "RESULTS", tmp_path / "new")
    bench.main()
    ((lengths, sizes),) = asked
    card = runcard.read_json(tmp_path / "new" / "time_against_length.json")
    assert card.keys() == CARD.keys()
    for name in ("command", "config", "data"):
        assert card[name] == CARD[name]
    assert (lengths, sizes) == (CARD["results"]["lengths"], CARD["config"])
    seconds = measure_time(lengths)
    assert card["results"] == {"lengths": lengths, "seconds": seconds, "crossover": lengths[2]}
    assert 0 <= card["seconds"] < 60
    assert (tmp_path / "new" / "time_against_length.png").read_bytes().startswith(b"\x89PNG")


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
    colours = [line.get_color() for line in axes.get_lines()[:3]]
    assert colours == [plots.BLACK, plots.ORANGE, plots.PURPLE]  # those of softmax and NaLa
    assert [line.get_linestyle() for line in axes.get_lines()[:3]] == ["--", "-", ":"]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert list(axes.get_lines()[3].get_xdata()) == [CARD["results"]["crossover"]] * 2
    assert axes.texts[0].get_position()[0] == CARD["results"]["crossover"]
    assert list(axes.get_lines()[1].get_xdata()) == CARD["results"]["lengths"]
    shown = axes.get_lines()[0].get_ydata()
    assert list(shown) == pytest.approx([1000 * s for s in CARD["results"]["seconds"]["softmax"]])
    nowhere = plots.time_against_length(CARD["results"] | {"crossover": None}).axes[0]
    assert not nowhere.texts
