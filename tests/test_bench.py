"""The measurements in nala_min/lab/bench.py, except for the clock itself."""

import types
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from nala_min import measure, nala_attention, plots, runcard
from nala_min.flags import run_script
from nala_min.lab import bench

CPU = torch.device("cpu")
CARD = runcard.read_json(runcard.RESULTS / "speed_cpu_float32.json")
RESULTS = CARD["results"]

# --- The compared forms ---------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_the_forms_are_one_attention(causal):
    """Softmax has the same mask."""
    forms = bench.forms(causal, compiled=False)
    q, k, v = torch.randn(3, 1, 2, 70, 8, dtype=torch.float64)
    expected = nala_attention(q, k, v, causal=causal, mode="parallel")
    for name in {"nala", "readable", "quadratic"} & forms.keys():
        assert_close(forms[name](q, k, v), expected)
    split = nala_attention(q, k, v, causal=causal, mode="parallel", feature_map="split")
    assert_close(forms["split"](q, k, v), split)
    softmax = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert_close(forms["softmax"](q, k, v), softmax)
    assert ("quadratic" in forms) == causal and "compiled" not in forms


def test_only_the_quadratic_form_holds_n_squared_numbers():
    peaks = {}
    for name in ("nala", "readable", "quadratic"):
        with measure.Recorder() as recorder:
            bench.forms(True, compiled=False)[name](*torch.randn(3, 1, 1, 512, 8))
        peaks[name] = recorder.peak
    assert peaks["nala"] <= peaks["readable"] < 4 * 512**2 <= peaks["quadratic"]


def test_the_two_passes():
    """Forward without gradients, or the gradients of all inputs; None if an input is unused."""
    inputs = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    seen = []

    def form(q, k, v):
        seen.append(torch.is_grad_enabled())
        return 2 * q + k.detach() + v

    passes = bench.passes(form, inputs)
    seen.clear()
    assert not passes["forward"]().requires_grad
    q, k, v = passes["forward + backward"]()
    assert seen == [False, True]
    assert k is None and torch.equal(q, torch.full((2, 3), 2.0)) and torch.equal(v, q / 2)


def test_decoding_attends_to_the_context_and_the_tokens_so_far(monkeypatch):
    heads = bench.heads
    monkeypatch.setattr(bench, "BURST", 4)
    drawn = []
    monkeypatch.setattr(
        bench, "heads", lambda *x, **kind: drawn.append(heads(*x, **kind)) or drawn[-1]
    )
    calls = bench.decode_calls(9, device=CPU, dtype=torch.float64)
    token, context = drawn
    q, k, v = (torch.cat([x, *4 * [y]], dim=2) for x, y in zip(context, token, strict=True))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, -1:]
    assert_close(calls["softmax", 9](), expected)
    assert_close(calls["softmax_grown", 9](), expected)
    assert_close(calls["nala", 9](), nala_attention(q, k, v, causal=True)[:, :, -1:])


def test_inputs_have_the_memory_layout_of_a_model():
    q, _, _ = bench.heads(10, device=CPU, dtype=torch.float32)
    assert q.shape == (1, 4, 10, 64) and q.requires_grad
    assert q.stride()[1:] == (64, 4 * 64, 1)  # all heads of a token side by side


# --- Timing ---------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that only advances when called."""
    now = [0.0]
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def advance(seconds):
        now[0] += seconds

    return advance


def test_calls_take_turns_until_the_budget_is_used_up(clock):
    calls = []

    def call(name, *durations):
        steps = iter(durations)

        def run():
            calls.append(name)
            torch.ones(250)  # 1000 bytes
            clock(next(steps))

        return run

    results = bench.take_turns(
        {
            "a": call("a", *(30, 1), *(0, 4), *(0, 2), *(0, 1)),
            "b": call("b", *(30, 2), *(0, 2), *(0, 5), *(0, 9)),
            "c": call("c", *(90, 60)),
        },
        CPU,
        budget=20,
    )
    assert "".join(calls) == "aabbcc" + 3 * "aabb"  # c exceeds the budget; a slow first run may
    assert results["a"] == {"median": 1.5, "low": 1, "high": 4, "runs": 4, "peak": 1000}
    assert results["b"] == {"median": 3.5, "low": 2, "high": 9, "runs": 4, "peak": 1000}
    assert results["c"] == {"median": 60, "low": 60, "high": 60, "runs": 1, "peak": 1000}


def test_at_least_three_and_at_most_fifty_turns_are_taken(clock):
    assert bench.take_turns({"a": lambda: clock(8)}, CPU, budget=9)["a"]["runs"] == 3
    assert bench.take_turns({"a": lambda: None}, CPU, budget=9)["a"]["runs"] == 50


def test_compiling_is_not_timed(clock):
    durations = iter([99.0, *(8 * [1.0])])
    rows = bench.take_turns({("compiled", "forward"): lambda: clock(next(durations))}, CPU, 2)
    assert rows["compiled", "forward"]["high"] == 1
    assert rows["compiled", "forward"]["peak"] is None


def row(form, length, median, **rest):
    case = {"causal": True, "pass": "forward + backward"}
    return {"form": form, "length": length, "median": median, **case, **rest}


@pytest.mark.parametrize(
    ("softmax", "nala", "length"),
    [
        ([1, 2, 4], [2, 2, 2], 20),
        ([1, 2, 4], [0, 0, 0], 10),
        ([1, 2, 4], [9, 9, 9], None),
        ([3, 1, 4], [2, 2, 2], 40),  # faster once, then slower
    ],
)
def test_crossover_is_where_nala_stays_faster(softmax, nala, length):
    rows = [row("softmax", *pair) for pair in zip([10, 20, 40], softmax, strict=True)]
    rows += [row("nala", *pair) for pair in zip([10, 20, 40], nala, strict=True)]
    rows += [row("nala", 10, 99, causal=False), row("softmax", 10, 1, causal=False)]
    assert bench.crossover(rows) == length


def test_the_table_has_the_speedup():
    rows = [row("softmax", 10, 0.004, low=0.003, high=0.009, peak=2**20)]
    rows += [row("compiled", 10, 0.001, low=0.001, high=0.002, peak=None)]
    first, second = (line.split() for line in bench.table(rows).splitlines())
    start = "10 forward + backward".split()
    assert first == [*start, *"softmax 4.000 ms (3.000 to 9.000) 1.00 x 1.00 MiB".split()]
    assert second == [*start, *"compiled 1.000 ms (1.000 to 2.000) 4.00 x".split()]


# --- The program ----------------------------------------------------------------------------------


def test_main_writes_a_card_and_a_picture(monkeypatch, tmp_path, capsys):
    """Quick and with fake times, a card has the same keys as the committed one."""
    times = {"median": 64.0, "low": 64.0, "high": 128.0, "runs": 1, "peak": 2**20}
    monkeypatch.setattr(bench, "take_turns", lambda calls, *_: dict.fromkeys(calls, times))
    monkeypatch.setattr(bench, "HEADS", 1)
    monkeypatch.setattr(bench, "DIM", 8)
    monkeypatch.setattr("sys.argv", ["bench.py", "--quick", "--device", "cpu"])
    monkeypatch.chdir(tmp_path)
    bench.main()
    card = runcard.read_json(tmp_path / "runs" / "speed" / "speed_cpu_float32.json")
    assert card["command"] == "python -m nala_min.lab.bench --quick --device cpu"
    assert card.keys() == CARD.keys() and card["config"].keys() == CARD["config"].keys()
    for name in ("attention", "decode"):
        assert card["results"][name][0].keys() == RESULTS[name][0].keys()
    assert {row["median"] for row in card["results"]["decode"]} == {0.5}  # per token
    assert (tmp_path / "runs" / "speed" / "speed_cpu_float32.png").exists()
    lengths = {n: [r["length"] for r in bench.select(card["results"]["attention"], form=n,
               causal=True, **{"pass": "forward"})] for n in ("nala", "quadratic")}  # fmt: skip
    assert lengths == {
        "nala": [2**i for i in range(6, 13)],
        "quadratic": [2**i for i in range(6, 12)],
    }
    assert "Decoding" in capsys.readouterr().out


def test_the_committed_card_is_complete_and_consistent():
    lengths = [2**i for i in range(6, 17)]
    for causal, which in product((True, False), ("forward", "forward + backward")):
        for form in [*bench.forms(causal, compiled=False), "compiled"]:
            case = {"form": form, "causal": causal, "pass": which}
            selected = bench.select(RESULTS["attention"], **case)
            assert [r["length"] for r in selected] == lengths[: 6 if form == "quadratic" else None]
            assert all(0 < r["low"] <= r["median"] <= r["high"] for r in selected)
    crossover = bench.crossover(RESULTS["attention"])
    assert RESULTS["crossover"]["causal, forward + backward"] == crossover
    assert CARD["command"] == "python -m nala_min.lab.bench"


def test_the_picture_agrees_with_the_card():
    time, memory, decode = plots.speed(RESULTS).axes
    which = {"causal": True, "pass": "forward + backward"}
    for label, form in {"softmax, fused": "softmax", "NaLa": "nala"}.items():
        rows = bench.select(RESULTS["attention"], form=form, **which)
        decoded = bench.select(RESULTS["decode"], form=form)
        for axes, expected in (
            (time, [1000 * r["median"] for r in rows]),
            (memory, [r["peak"] / 2**20 for r in rows]),
            (decode, [1000 * r["median"] for r in decoded]),
        ):
            (drawn,) = (line for line in axes.get_lines() if line.get_label() == label)
            assert list(drawn.get_ydata()) == pytest.approx(expected)
    crossover = RESULTS["crossover"]["causal, forward + backward"]
    (note,) = time.texts
    assert f"{crossover:,}" in note.get_text() and note.xy[0] == crossover
    without_crossover = RESULTS | {"crossover": dict.fromkeys(RESULTS["crossover"])}
    assert not plots.speed(without_crossover).axes[0].texts


def test_an_unwritable_output_is_an_error_before_the_work(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--out", str(tmp_path / "file" / "x")])
    monkeypatch.setattr(bench, "take_turns", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="2"):
        run_script(bench.main)
    assert "cannot be written" in capsys.readouterr().err
