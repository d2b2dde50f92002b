"""bench.py measures what its rows say: which form, pass and mask, and how the clock runs."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scripts import run_here
from torch.testing import assert_close

from nala_min import nala_attention, runcard
from nala_min.lab import bench

CPU = torch.device("cpu")


@pytest.mark.parametrize("causal", [True, False])
def test_the_forms_are_one_attention_with_one_mask(causal, monkeypatch):
    options = []
    monkeypatch.setattr(torch, "compile", lambda form, **x: options.append(x) or form)
    forms = bench.forms(causal, compiled=True)
    assert options == [{"fullgraph": True, "dynamic": False}]
    q, k, v = torch.randn(3, 1, 2, 70, 8, dtype=torch.float64)
    reference = partial(nala_attention, q, k, v, causal=causal, mode="parallel")
    expected = dict.fromkeys(("nala", "readable", "compiled"), reference())
    expected |= {"quadratic": reference()} if causal else {}
    expected["split"] = reference(feature_map="split")
    expected["softmax"] = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert forms.keys() == expected.keys() == {"compiled", *bench.forms(causal, compiled=False)}
    for name, form in forms.items():
        assert_close(form(q, k, v), expected[name])


def test_decoding_attends_to_the_context_and_the_tokens_so_far(monkeypatch):
    drawn = {n: bench.heads(n, device=CPU, dtype=torch.float64) for n in (1, 9)}
    assert drawn[9][0].shape == (1, 4, 9, 64) and drawn[9][0].requires_grad
    assert drawn[9][0].stride()[1:] == (64, 4 * 64, 1)  # heads of a token side by side, as a model
    monkeypatch.setattr(bench, "BURST", 4)
    monkeypatch.setattr(bench, "heads", drawn.get)
    calls = bench.decode_calls(9)
    q, k, v = (torch.cat([x, *4 * [y]], dim=2) for y, x in zip(*drawn.values(), strict=True))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, -1:]
    assert_close(calls["softmax", 9](), expected)
    assert_close(calls["softmax_grown", 9](), expected)
    assert_close(calls["nala", 9](), nala_attention(q, k, v, causal=True)[:, :, -1:])


@pytest.mark.parametrize("kind", ["cpu", "mps", "cuda"])
def test_the_clock_runs_between_two_synchronisations_on_a_flushed_gpu(kind, monkeypatch):
    events, times = [], iter([10.0, 12.5])

    def note(name, result=lambda: None):
        return lambda *_, **__: events.append(name) or result()

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=note("clock", times.__next__)))
    monkeypatch.setattr(torch.mps, "synchronize", note("wait for mps"))
    monkeypatch.setattr(torch.cuda, "synchronize", note("wait for cuda"))
    monkeypatch.setattr(torch, "empty", note("flush", partial(torch.zeros, 1)))
    assert bench.seconds_of(note("call"), torch.device(kind)) == 2.5
    wait = [f"wait for {kind}"] * (kind != "cpu")
    assert events == ["flush"] * (kind == "cuda") + [*wait, "clock", "call", *wait, "clock"]


def test_calls_take_turns_until_the_budget_is_used_up(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call(name, *seconds):
        durations = iter(seconds)

        def run():
            order.append(name)
            torch.ones(250)  # 1000 bytes
            now[0] += next(durations, seconds[-1])

        return run

    def measure(budget, **calls):
        return bench.take_turns({x: call(x, *seconds) for x, seconds in calls.items()}, CPU, budget)

    a, b = (30, 1, 0, 4, 0, 2, 0, 1), (30, 2, 0, 2, 0, 5, 0, 9)  # every second one is timed
    rows = measure(20, a=a, b=b, c=(90, 60))
    assert "".join(order) == "aabbcc" + 3 * "aabb"  # c exceeds the budget; a slow first run may
    names = ("median", "low", "high", "runs", "peak")
    for form, found in {"a": (1.5, 1, 4, 4), "b": (3.5, 2, 9, 4), "c": (60, 60, 60, 1)}.items():
        assert rows[form] == dict(zip(names, (*found, 1000), strict=True))
    assert measure(9, a=(8,))["a"]["runs"] == 3 and measure(9, a=(0,))["a"]["runs"] == 50


@pytest.mark.parametrize(
    ("softmax", "nala", "length"),
    [((1, 2, 4), (2, 2, 2), 20), ((1, 2, 4), (0, 0, 0), 10), ((1, 2, 4), (9, 9, 9), None),
     ((3, 1, 4), (2, 2, 2), 40)],  # faster once, then slower
)  # fmt: skip
def test_the_crossover_is_where_nala_stays_at_least_as_fast(softmax, nala, length):
    case = {"causal": True, "pass": "forward + backward", "low": 1, "high": 9, "peak": 2**20}
    rows = [
        {"form": form, "length": n, "median": time, **case}
        for form, times in (("softmax", softmax), ("nala", nala))
        for n, time in zip((10, 20, 40), times, strict=True)
    ]
    others = [rows[0] | {"causal": False}, rows[3] | {"causal": False, "median": 99}]
    assert bench.crossover(rows + others) == length


def test_rows_name_the_mask_that_was_measured_and_flags_reach_all(tmp_path, monkeypatch):
    """A call is said to take 64 s, or 128 s if its first output is not the first value: it sees
    more than the past."""
    inputs, budgets, heads = [], set(), bench.heads

    def take_turns(calls, device, budget):
        budgets.add(budget)
        first, rows = inputs[-1][2][:, :, :1], {}
        for name, call in calls.items():
            sees_all = name[1] == "forward" and not torch.equal(call()[:, :, :1], first)
            rows[name] = dict.fromkeys(("median", "low", "high", "peak"), 128 if sees_all else 64)
        return rows

    changes = {"take_turns": take_turns, "HEADS": 1, "DIM": 8}
    changes["heads"] = lambda n, **kind: inputs.append(heads(n, **kind)) or inputs[-1]
    for name, value in changes.items():
        monkeypatch.setattr(bench, name, value)
    flags = ["--device", "cpu", "--quick", "--dtype", "bfloat16"]
    result = run_here(bench, tmp_path, *flags)
    assert (result.returncode, result.stderr) == (0, "")
    path = tmp_path / "runs" / "speed" / "speed_cpu_bfloat16.json"
    card, results = runcard.read_json(path), runcard.read_json(path)["results"]
    assert card["command"] == f"python -m nala_min.lab.bench {' '.join(flags)}"
    assert card["config"] == {"seed": 1, "batch": 1, "heads": 1, "dim": 8, "dtype": "bfloat16"}
    assert {q.dtype for q, _, _ in inputs} == {torch.bfloat16} and budgets == {0.5}
    assert path.with_suffix(".png").exists()
    lengths = [2**i for i in range(6, 13)]
    for causal in (True, False):
        rows = bench.select(results["attention"], causal=causal, **{"pass": "forward"})
        assert {row["median"] for row in rows} == {64 if causal else 128}
        for form, expected in {"nala": lengths, "quadratic": lengths[: 6 * causal]}.items():
            assert [row["length"] for row in rows if row["form"] == form] == expected
    assert [x["context"] for x in results["decode"] if x["form"] == "softmax"] == lengths[::2]
    assert {row["median"] for row in results["decode"]} == {0.5}  # per token
    assert results["crossover"] == {"causal, forward + backward": 64}
