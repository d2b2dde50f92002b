"""The measurements in nala_min/lab/bench.py, except for the clock itself."""

import itertools
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from nala_min import (
    key_features,
    measure,
    nala_attention,
    plots,
    query_features,
    runcard,
    softmax_attention,
)
from nala_min.flags import UsageError, run_script
from nala_min.lab import bench

CPU = torch.device("cpu")
CARDS = {
    name: runcard.read_json(runcard.RESULTS / f"speed_cpu_{name}.json")
    for name in ("float32", "peers", "long", "segments")
}
RESULTS = CARDS["float32"]["results"]


# --- The compared forms ---------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_the_forms_are_one_attention(causal):
    """The product takes features. Softmax has the same mask."""
    forms = bench.forms(causal, compiled=False)
    q, k, v = torch.randn(3, 1, 2, 70, 8, dtype=torch.float64)
    expected = nala_attention(q, k, v, causal=causal, mode="parallel")
    for name in {"nala", "readable", "quadratic"} & forms.keys():
        assert_close(forms[name](q, k, v), expected)
    assert_close(forms["product"](query_features(q), key_features(k), v), expected)
    split = nala_attention(q, k, v, causal=causal, mode="parallel", feature_map="split")
    assert_close(forms["split"](q, k, v), split)
    assert_close(
        forms["softmax"](q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    )
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


def test_softmax_written_out_is_softmax_and_its_memory_is_computed(monkeypatch):
    """Scores, exponentials and gradients: at least two N x N matrices per head."""
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    assert_close(bench.written_out(q, k, v), softmax_attention(q, k, v))
    monkeypatch.setattr(bench, "LONG", 200)
    rows = bench.long_rows(CPU, torch.float32, 0)
    assert [row["form"] for row in rows] == ["softmax", "nala", "written out"]
    weights = bench.HEADS * 200 * 200 * 4
    assert 2 * weights < rows[2]["peak"] < 4 * weights
    inputs = [bench.random_heads(200, CPU, torch.float32).requires_grad_() for _ in range(3)]
    call = bench.passes(bench.written_out, inputs)["forward + backward"]
    assert rows[2]["peak"] == bench.peak_of(call, CPU, compiled=False)


def test_decoding_attends_to_the_same_context(monkeypatch):
    """All three see the context and the tokens decoded so far; times are per token."""
    outputs = {}

    def take_turns(calls, device, budget):
        outputs.update({name: call() for name, call in calls.items()})
        row = {"median": 8.0, "low": 4.0, "high": 16.0, "runs": 3, "bytes": 12}
        return {name: row for name in calls}

    monkeypatch.setattr(bench, "take_turns", take_turns)
    monkeypatch.setattr(bench, "BURST", 4)
    contexts = (5, 9)
    calls = []
    recorded = {name: bench.ATTENTIONS[name] for name in ("nala", "softmax")}
    for name, real in (recorded | {"context": bench.nala_attention}).items():

        def attention(*qkv, real=real, **options):
            calls.append((qkv, options.get("state")))
            return real(*qkv, **options)

        if name == "context":
            monkeypatch.setattr(bench, "nala_attention", attention)
        else:
            monkeypatch.setitem(bench.ATTENTIONS, name, attention)
    rows = bench.decode_rows(contexts, CPU, torch.float64, 0)
    forms = ("softmax", "softmax_grown", "nala")
    assert {(row["form"], row["context"]) for row in rows} == set(
        itertools.product(forms, contexts)
    )
    assert all([row[k] for k in ("median", "low", "high", "bytes")] == [2, 1, 4, 3] for row in rows)
    for context in contexts:
        assert_close(outputs["softmax", context], outputs["softmax_grown", context])
    (first, nothing), *_ = calls  # the context in NaLa's state
    assert nothing is None and first[0].shape[2] == contexts[0]
    token = next(qkv for qkv, state in calls if state is not None)
    whole = [torch.cat([x, *4 * [y]], dim=2) for x, y in zip(first, token, strict=True)]
    expected = nala_attention(*whole, causal=True)[:, :, -1:]
    assert_close(outputs["nala", contexts[0]], expected)


def test_a_training_step_trains():
    tokens = torch.arange(18).view(2, 9) % 7
    for name in ("softmax", "nala"):
        step = bench.training_step(name, tokens, CPU)
        model = dict(zip(step.__code__.co_freevars, step.__closure__, strict=True))["model"]
        model = model.cell_contents
        assert model.config.attention == name and model.config.dim == 128

        def loss(model=model):
            logits, _ = model(tokens[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()

        before = loss()
        for _ in range(3):
            step()
        assert loss() < before


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
    assert results["a"] == {"median": 1.5, "low": 1, "high": 4, "runs": 4, "peak": 0}
    assert results["b"] == {"median": 3.5, "low": 2, "high": 9, "runs": 4, "peak": 0}
    assert results["c"] == {"median": 60, "low": 60, "high": 60, "runs": 1, "peak": 0}


def test_at_least_three_and_at_most_fifty_turns_are_taken(clock):
    assert bench.take_turns({"a": lambda: clock(8)}, CPU, budget=9)["a"]["runs"] == 3
    assert bench.take_turns({"a": lambda: None}, CPU, budget=9)["a"]["runs"] == 50


def test_compiling_is_not_timed(clock):
    durations = iter([99.0, *(8 * [1.0])])
    rows = bench.take_turns({("compiled", "forward"): lambda: clock(next(durations))}, CPU, 2)
    assert rows["compiled", "forward"]["high"] == 1
    assert rows["compiled", "forward"]["peak"] is None


def test_the_peak_is_of_tensors_that_exist_at_once():
    def call():
        first = torch.ones(1000)
        del first
        return torch.ones(500) + torch.ones(500)

    assert bench.peak_of(call, CPU, compiled=False) == 6000


def row(form, length, median, **rest):
    return {"form": form, "length": length, "median": median, "causal": True, **rest}


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
    assert bench.crossover(rows, causal=True) == length


def test_the_table_has_the_speedup():
    rows = [row("softmax", 10, 0.004, low=0.003, high=0.009, peak=2**20)]
    rows += [row("compiled", 10, 0.001, low=0.001, high=0.002, peak=None)]
    first, second = bench.table(rows).splitlines()
    assert first.split() == "10 softmax 4.000 ms (3.000 to 9.000) 1.00 x 1.00 MiB".split()
    assert second.split() == "10 compiled 1.000 ms (1.000 to 2.000) 4.00 x".split()


def test_the_work_of_a_call():
    """An operation reads its inputs and writes its output; views and empty tensors cost nothing."""
    x, y = torch.ones(10, 20), torch.empty(10, 10)
    for call, in_bytes, flops in [
        (lambda: x + 1, 1600, 0),
        (lambda: x.add_(1), 1600, 0),
        (lambda: torch.add(x, 1, out=torch.empty(10, 20)), 1600, 0),
        (lambda: x.t().view(2, 10, 10)[0], 0, 0),
        (lambda: torch.empty_like(x), 0, 0),
        (lambda: torch.mm(x, x.t(), out=y), 2000, 4000),
    ]:
        assert bench.work_of(call) == {"bytes": in_bytes, "flops": flops, "fused": []}
    q = torch.ones(1, 1, 4, 8)
    assert "scaled_dot_product" in bench.work_of(lambda: softmax_attention(q, q, q))["fused"][0]


def test_a_gpu_is_shown_beside_its_limits(monkeypatch):
    """A copy of 4^2 numbers takes half a second, a product of 4 x 4 matrices a second."""
    monkeypatch.setattr(bench, "LARGE", 4)
    times = {"copy": {"median": 0.5}, "product": {"median": 1.0}}
    monkeypatch.setattr(bench, "take_turns", lambda calls, *_: calls and times)
    assert bench.limits(CPU, torch.float64, 0) == {"bytes": 2 * 128 / 0.5, "flops": 128}
    (line,) = bench.table(
        [row("softmax", 10, 0.5, low=0.5, high=0.5, peak=None, bytes=10**12, flops=3 * 10**12)]
    ).splitlines()
    assert line.endswith("2,000 GB/s     6.00 TFLOP/s")


@pytest.mark.parametrize("causal", [True, False])
def test_segment_sizes_are_those_that_run(monkeypatch, causal):
    used = []
    real = bench.fast.attention

    def attention(*args, **options):
        used.append(bench.fast.SEGMENT)
        return real(*args, **options)

    monkeypatch.setattr(bench.fast, "attention", attention)
    monkeypatch.setattr(
        bench, "take_turns", lambda calls, *_: {n: {"x": c()} for n, c in calls.items()}
    )
    before = bench.fast.SEGMENT
    rows = [r for r in bench.segment_rows(32, CPU, torch.float32, 0) if r["causal"] == causal]
    assert used[-len(rows) :] == [2 ** int(r["form"].removeprefix("2^")) for r in rows]
    assert (
        f"2^{before.bit_length() - 1}" in [r["form"] for r in rows] and bench.fast.SEGMENT == before
    )


# --- Other libraries ------------------------------------------------------------------------------


def prefix_sums(q, k, v):
    """Unnormalised causal linear attention, (B, H, N, .)."""
    return (q @ k.mT).tril() @ v


def install(monkeypatch, **functions):
    """Install modules that behave like the libraries, unless functions replace theirs."""

    def naive_chunk_linear_attn(q, k, v, scale=None, normalize=False):  # (B, N, H, .)
        assert scale == 1 and normalize
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return (prefix_sums(q, k, v) / prefix_sums(q, k, v[..., :1] ** 0)).transpose(1, 2)

    def chunk_linear_attn(q, k, v, scale=None, normalize=True):
        return naive_chunk_linear_attn(q, k, v, scale, normalize), None

    def causal_linear_attention_noncuda(q, k, v):
        return prefix_sums(q, k, v) / prefix_sums(q, k, v[..., :1] ** 0)

    functions_by_module = {
        "fla.ops.linear_attn.naive": naive_chunk_linear_attn,
        "fast_transformers.causal_product": prefix_sums,
        "performer_pytorch.performer_pytorch": causal_linear_attention_noncuda,
    }
    for path, function in functions_by_module.items():
        names = path.split(".")
        for i in range(len(names)):
            module = types.ModuleType(".".join(names[: i + 1]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        name = "causal_dot_product" if names[0] == "fast_transformers" else function.__name__
        setattr(module, name, functions.get(names[0], function))
    sys.modules["fla.ops.linear_attn"].chunk_linear_attn = chunk_linear_attn
    monkeypatch.setattr(bench, "find_spec", lambda name: name)
    monkeypatch.setattr(bench, "DIM", 4)


def test_peers_are_given_features_and_must_agree_with_ours(monkeypatch):
    install(monkeypatch)
    ((*rows,),) = bench.peer_rows({16: (1, 2, 4)}, CPU, torch.float32, 0)
    on_cpu = bench.peers(CPU)
    assert [r["form"] for r in rows[::2]] == list(on_cpu)
    assert list(on_cpu) == ["nala", "fla_naive_chunk", "fast_transformers", "performer_pytorch"]
    on_cuda = bench.peers(torch.device("cuda"))
    assert [name for name in on_cuda if name not in on_cpu] == ["fla_chunk"]
    inputs = torch.rand(3, 1, 2, 16, 4)
    assert_close(on_cuda["fla_chunk"](*inputs), on_cpu["nala"](*inputs))
    for name in ("fla", "fast_transformers", "performer_pytorch"):
        install(monkeypatch, **{name: lambda q, k, v, *rest, **options: v})
        with pytest.raises(AssertionError):
            list(bench.peer_rows({16: (1, 2, 4)}, CPU, torch.float32, 0))


def test_peers_get_query_and_key_features_of_the_given_shape(monkeypatch):
    given = []
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "query_features", torch.ones_like)
    monkeypatch.setattr(bench, "key_features", lambda k: torch.full_like(k, 2))
    monkeypatch.setattr(bench, "passes", lambda attention, inputs: given.extend(inputs) or {})
    list(bench.peer_rows({16: (3, 2, 5)}, CPU, torch.bfloat16, 0))
    assert [(x.shape, x.dtype) for x in given] == 3 * [((3, 2, 16, 5), torch.bfloat16)]
    assert (given[0] == 1).all() and (given[1] == 2).all()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_has_the_peers_own_shapes(monkeypatch, device):
    given = []
    monkeypatch.setattr(bench, "limits", lambda *_: {"bytes": 1, "flops": 1})
    monkeypatch.setattr(bench, "peer_rows", lambda shapes, *_: given.append(shapes) or [])
    settings, device = bench.Settings(quick=True, peers=True), torch.device(device)
    bench.measure(settings, device)
    config = bench.sizes_of_inputs(settings, device)
    if device.type == "cuda":
        assert given == [bench.PEER_SHAPES] and config == {"shapes": bench.PEER_SHAPES}
    else:
        assert given == [{1024: (1, 4, 64)}] and config == {"batch": 1, "heads": 4, "dim": 64}


def test_without_other_libraries_only_ours_is_measured(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert list(bench.peers(CPU)) == ["nala"]


# --- The program ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["peers", "long", "segments"])
def test_a_cpu_has_these_modes_in_float32_only(mode):
    settings = bench.Settings(dtype="bfloat16", **{mode: True})
    with pytest.raises(UsageError, match=f"--dtype must be float32 with --{mode}"):
        bench.card_name(settings, CPU)
    assert bench.card_name(settings, torch.device("cuda")) == f"speed_cuda_{mode}_bfloat16"


@pytest.mark.parametrize("name", CARDS)
def test_main_writes_a_card_and_a_picture(monkeypatch, tmp_path, capsys, name):
    """Quick and with fake times, a card has the same keys as the committed one."""

    def take_turns(calls, device, budget):
        return {
            name: {"median": 0.1, "low": 0.1, "high": 0.2, "runs": 1, "peak": 2**20}
            for name in calls
        }

    monkeypatch.setattr(bench, "take_turns", take_turns)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "HEADS", 1)
    monkeypatch.setattr(bench, "LONG", 64)
    monkeypatch.setattr(bench, "DIM", 8)
    monkeypatch.setattr(bench, "__doc__", None)  # as under python -OO
    flags = ["--quick"] if name == "float32" else ["--quick", f"--{name}"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags, "--device", "cpu"])
    monkeypatch.chdir(tmp_path)
    bench.main()
    card = runcard.read_json(tmp_path / "runs" / "speed" / f"speed_cpu_{name}.json")
    assert card["command"] == f"python -m nala_min.lab.bench {' '.join(flags)} --device cpu"
    assert (
        card.keys() == CARDS[name].keys() and card["config"].keys() == CARDS[name]["config"].keys()
    )
    assert card["results"].keys() == CARDS[name]["results"].keys()
    picture = tmp_path / "runs" / "speed" / "speed_cpu_float32.png"
    assert picture.exists() == (name == "float32")
    out = capsys.readouterr().out
    assert "take turns in one run" in out and "reference is" in out and "speed_cpu_" in out


def test_the_committed_cards_are_complete_and_consistent():
    lengths = [2**i for i in range(6, 17)]
    rows = RESULTS["attention"]
    for causal, direction in ((True, "causal"), (False, "bidirectional")):
        forms = [*bench.forms(causal, compiled=False), "compiled"]
        for what in ("forward", "forward + backward"):
            for form in forms:
                selected = bench.select(rows, form=form, causal=causal, **{"pass": what})
                longest = bench.MAX_LENGTH.get(form, lengths[-1])
                assert [r["length"] for r in selected] == [n for n in lengths if n <= longest], form
                assert all(0 < r["low"] <= r["median"] <= r["high"] for r in selected)
            crossover = bench.crossover(rows, causal=causal, **{"pass": what})
            assert RESULTS["crossover"][f"{direction}, {what}"] == crossover
    for name, card in CARDS.items():
        flag = "" if name == "float32" else f" --{name}"
        assert card["command"] == f"python -m nala_min.lab.bench{flag}"
    assert {r["form"] for r in CARDS["peers"]["results"]["peers"]} == {
        "nala",
        "fla_naive_chunk",
        "fast_transformers",
        "performer_pytorch",
    }
    assert {(r["form"], r["block"]) for r in RESULTS["steps"]} == set(
        itertools.product(("softmax", "nala", "elu"), bench.WINDOWS)
    )
    long = CARDS["long"]["results"]
    assert {(r["form"], r["block"]) for r in long["steps"]} == set(
        itertools.product(("softmax", "nala", "elu"), bench.LONG_WINDOWS)
    )
    assert {r["length"] for r in long["long"]} == {bench.LONG}


def test_the_picture_agrees_with_the_card():
    figure = plots.speed(RESULTS)
    time, memory, decode = figure.axes
    lines = {line.get_label(): line for line in time.get_lines()}
    assert {"softmax, fused", "NaLa", "NaLa, compiled"} < lines.keys()
    which = {"causal": True, "pass": "forward + backward"}
    for label, form in {"softmax, fused": "softmax", "NaLa": "nala"}.items():
        rows = bench.select(RESULTS["attention"], form=form, **which)
        assert list(lines[label].get_xdata()) == [r["length"] for r in rows]
        assert list(lines[label].get_ydata()) == pytest.approx([1000 * r["median"] for r in rows])
        (drawn,) = (line for line in memory.get_lines() if line.get_label() == label)
        assert list(drawn.get_ydata()) == pytest.approx([r["peak"] / 2**20 for r in rows])
        rows = bench.select(RESULTS["decode"], form=form)
        (drawn,) = (line for line in decode.get_lines() if line.get_label() == label)
        assert list(drawn.get_ydata()) == pytest.approx([1000 * r["median"] for r in rows])
    crossover = RESULTS["crossover"]["causal, forward + backward"]
    (note,) = time.texts
    assert f"{crossover:,}" in note.get_text() and note.xy[0] == crossover
    assert all(axes.get_xscale() == axes.get_yscale() == "log" for axes in figure.axes)
    without_crossover = RESULTS | {"crossover": dict.fromkeys(RESULTS["crossover"])}
    assert not plots.speed(without_crossover).axes[0].texts


def test_an_unwritable_output_is_an_error_before_the_work(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "x")
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--out", out])
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="2"):
        run_script(bench.main)
    assert "cannot be written" in capsys.readouterr().err
