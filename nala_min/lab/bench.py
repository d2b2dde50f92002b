"""Speed and memory. `python -m nala_min.lab.bench` measures attention over more and more tokens,
decoding after longer and longer contexts, and whole training steps, for NaLa and the fused softmax.
It prints tables and writes a run card and a picture. METHOD says how it measures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nala_min import (
    ATTENTIONS,
    LMConfig,
    NaLaLM,
    fast,
    key_features,
    nala_attention,
    plots,
    query_features,
    runcard,
    softmax_attention,
    train,
)
from nala_min.flags import UsageError, flag, parse_flags, run_script
from nala_min.measure import Recorder, next_token_loss

Call = Callable[[], Any]
Row = dict[str, Any]
Shape = tuple[int, int, int]  # B, H, D
BATCH, HEADS, DIM = 1, 4, 64
WINDOWS = {64: 12, 128: 8, 256: 8}  # window length in characters: batch size
LONG_WINDOWS = {128: 8, 1024: 1, 4096: 1, 16384: 1}  # the same for --long
LONG = 70_000  # tokens for --long
# --peers on a GPU: tokens, and (B, H, D). These are flash-linear-attention's own benchmark shapes.
PEER_SHAPES: dict[int, Shape] = {2**10: (8, 8, 64), 2**11: (4, 16, 128), 2**14: (2, 16, 128)}
MAX_LENGTH = {"quadratic": 2**11}  # tokens; larger N x N weights would slow down the others
LARGE = 2**13  # side of the matrix that shows a GPU's limits
BURST = 128  # tokens to decode in a row
METHOD = """\
All forms take turns in one run, so a slow minute slows all of them. Only the call is timed, with
its backward pass where stated; its inputs are allocated beforehand, in the memory layout of a
model. In each turn a call runs twice and only the second run is timed, so memory and caches are as
the first run left them. On a GPU, the caches are flushed before the timed run."""


@dataclass
class Settings:
    """Measure the speed and memory of attention, decoding and training steps."""

    quick: bool = flag(False, "up to 4,096 tokens, and fewer repetitions: under a minute")
    peers: bool = flag(False, "compare with other installed libraries instead")
    long: bool = flag(False, "measure training steps on long windows, and 70,000 tokens, instead")
    segments: bool = flag(False, "compare segment sizes of fast.py instead")
    device: str = flag("auto", "device to measure", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = flag(
        "float32", "dtype of q, k and v", choices=["float32", "bfloat16", "float16", "float64"]
    )
    out: Path = flag(Path("runs/speed"), "folder for the run card and the picture")


# --- Time and memory ------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds_of(call: Call, device: torch.device) -> float:
    """Wall time of one call, including launches. On a CUDA card the caches are flushed first."""
    if device.type == "cuda":
        torch.empty(2**28, dtype=torch.int8, device=device).zero_()  # larger than any cache
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def peak_of(call: Call, device: torch.device, compiled: bool) -> int | None:
    """Peak bytes of the tensors that call makes; None for code compiled for a CPU, where tensors
    cannot be counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if compiled:
        call()
        return None
    with Recorder() as recorder:
        call()
    return recorder.peak


def work_of(call: Call) -> Row:
    """Bytes that call's PyTorch operations read and write, floating-point operations in its matrix
    products and a GPU's fused softmax, and the name of that fused softmax."""
    with Recorder() as recorder, FlopCounterMode(display=False) as counter:
        call()
    fused = sorted(name for name in recorder.names if "scaled_dot_product" in name)
    return {"bytes": recorder.bytes, "flops": counter.get_total_flops(), "fused": fused}


def limits(device: torch.device, dtype: torch.dtype, budget: float) -> Row:
    """Bytes per second of a large copy, and operations per second of a large matrix product."""
    x = torch.randn(LARGE, LARGE, device=device, dtype=dtype)
    rows = take_turns({"copy": x.clone, "product": lambda: x @ x}, device, budget)
    copy, product = (rows[name]["median"] for name in ("copy", "product"))
    return {"bytes": 2 * x.nbytes / copy, "flops": 2 * LARGE**3 / product}


def take_turns(calls: dict[Any, Call], device: torch.device, budget: float) -> dict[Any, Row]:
    """Time calls in turn until budget seconds have passed: at least 3 and at most 50 times each, or
    once if one run exceeds the budget.

    Returns for each call the median, lowest and highest seconds, the number of timed runs, and the
    peak memory; on a GPU also its work, unless it is compiled.
    """
    timings: dict[Any, list[float]] = {}
    peaks, work = {}, {name: {} for name in calls}
    for name, call in calls.items():  # the first turn
        compiled = "compiled" in name
        if device.type != "cpu" and not compiled:
            work[name] = work_of(call)
        if compiled or device.type != "cpu":
            call()  # compiles; GPU libraries allocate their workspace
        peaks[name] = peak_of(call, device, compiled)
        timings[name] = [seconds_of(call, device)]
    repeated = {name: call for name, call in calls.items() if timings[name][0] <= budget}
    start, turns = time.perf_counter(), 1
    while repeated and turns < 50 and (turns < 3 or time.perf_counter() - start < budget):
        for name, call in repeated.items():
            call()
            timings[name].append(seconds_of(call, device))
        turns += 1
    return {
        name: {
            "median": median(seconds),
            "low": min(seconds),
            "high": max(seconds),
            "runs": len(seconds),
            "peak": peaks[name],
            **work[name],
        }
        for name, seconds in timings.items()
    }


# --- Attention against the number of tokens -------------------------------------------------------


def forms(causal: bool, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """The forms to compare, each a function of q, k and v. "product" takes features instead of q
    and k: it shows the cost of attention without its feature map."""
    attention = partial(nala_attention, causal=causal)
    found = {
        "softmax": partial(softmax_attention, causal=causal),
        "nala": attention,
        "split": partial(attention, feature_map="split"),
        "product": partial(attention, feature_map="relu"),  # leaves features unchanged
    }
    if causal:
        found["readable"] = partial(attention, mode="chunked")
        found["quadratic"] = partial(attention, mode="quadratic")
    else:
        found["readable"] = partial(attention, mode="parallel")
    if compiled:
        torch._dynamo.reset()  # one kernel per length
        found["compiled"] = torch.compile(attention, fullgraph=True, dynamic=False)
    return found


def passes(form: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Call]:
    """The two calls to time: the forward pass alone, and both passes."""

    def forward() -> Tensor:
        with torch.no_grad():
            return form(*inputs)

    grad_output = torch.ones_like(forward())

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(form(*inputs), inputs, grad_output, allow_unused=True)

    return {"forward": forward, "forward + backward": forward_backward}


def random_heads(
    length: int, device: torch.device, dtype: torch.dtype, shape: Shape | None = None
) -> Tensor:
    """Random (B, H, N, D) in the memory layout of a model: all heads of a token side by side."""
    batch, heads, dim = shape or (BATCH, HEADS, DIM)
    return torch.randn(batch, length, heads, dim, device=device, dtype=dtype).transpose(1, 2)


def attention_rows(
    lengths: list[int], device: torch.device, dtype: torch.dtype, budget: float, compiled: bool
) -> Iterator[list[Row]]:
    """Yield the rows of all forms and both passes, for each length and direction."""
    for length in lengths:
        inputs = [random_heads(length, device, dtype).requires_grad_() for _ in range(3)]
        q, k, v = inputs
        with torch.no_grad():
            features = [query_features(q).to(dtype), key_features(k).to(dtype)]
        features = [x.requires_grad_() for x in features]
        for causal in (True, False):
            calls = {}
            for form, attention in forms(causal, compiled).items():
                if length <= MAX_LENGTH.get(form, length):
                    arguments = [*features, v] if form == "product" else inputs
                    for name, call in passes(attention, arguments).items():
                        calls[form, name] = call
            case = {"length": length, "causal": causal}
            yield [
                {"form": form, "pass": name, **case, **row}
                for (form, name), row in take_turns(calls, device, budget).items()
            ]


def long_rows(device: torch.device, dtype: torch.dtype, budget: float) -> list[Row]:
    """Forward and backward pass of bidirectional attention over LONG tokens. "written out" is
    softmax with its N x N weights: their memory is counted, but nothing is computed."""
    inputs = [random_heads(LONG, device, dtype).requires_grad_() for _ in range(3)]
    calls = {
        name: passes(attention, inputs)["forward + backward"]
        for name, attention in (("softmax", softmax_attention), ("nala", nala_attention))
    }
    case = {"length": LONG, "causal": False, "pass": "forward + backward"}
    rows = [
        {"form": name, **case, **row} for name, row in take_turns(calls, device, budget).items()
    ]
    shapes = [random_heads(LONG, torch.device("meta"), dtype).requires_grad_() for _ in range(3)]
    call = passes(written_out, shapes)["forward + backward"]
    return [*rows, {"form": "written out", **case, "peak": peak_of(call, shapes[0].device, False)}]


def segment_rows(length: int, device: torch.device, dtype: torch.dtype, budget: float) -> list[Row]:
    """Forward and backward pass with segments of each size: "2^17" has 2^17 elements of q."""
    on_cpu = device.type == "cpu"
    name = "SEGMENT" if on_cpu else "LARGE_SEGMENT"
    sizes = range(15, 20) if on_cpu else range(20, 27)
    inputs = [random_heads(length, device, dtype).requires_grad_() for _ in range(3)]
    rows = []
    for causal in (True, False):
        case = {"length": length, "causal": causal, "pass": "forward + backward"}
        call = passes(partial(nala_attention, causal=causal), inputs)[case["pass"]]
        calls = {f"2^{i}": patch.object(fast, name, 2**i)(call) for i in sizes}
        for form, row in take_turns(calls, device, budget).items():
            rows.append({"form": form, **case, **row})
    return rows


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention with its N x N weights, exactly as in Eq. (1)."""
    return (q @ k.mT / q.shape[3] ** 0.5).softmax(dim=-1) @ v


def crossover(rows: list[Row], form: str = "nala", **case: Any) -> int | None:
    """The smallest length from which form's median never exceeds softmax's, or None."""
    times = {
        name: {row["length"]: row["median"] for row in select(rows, form=name, **case)}
        for name in ("softmax", form)
    }
    found = None
    for length in sorted(times[form], reverse=True):
        if times[form][length] > times["softmax"][length]:
            break
        found = length
    return found


def select(rows: list[Row], **values: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


# --- Decoding, and training steps -----------------------------------------------------------------


def decode_rows(
    contexts: list[int], device: torch.device, dtype: torch.dtype, budget: float
) -> list[Row]:
    """Time per token after a context, averaged over BURST tokens. "nala" carries its state.
    "softmax_grown" appends to its keys and values, as our model does. "softmax" has a preallocated
    cache, so nothing is copied."""
    token = [random_heads(1, device, dtype) for _ in range(3)]
    options = {"causal": True, "return_state": True}

    def grow(attention: Callable, state: Any) -> Tensor:
        for _ in range(BURST):
            out, state = attention(*token, state=state, **options)
        return out

    def attend(k: Tensor, v: Tensor, context: int) -> Tensor:
        for seen in range(context + 1, context + BURST + 1):
            out = F.scaled_dot_product_attention(token[0], k[:, :, :seen], v[:, :, :seen])
        return out

    calls: dict[tuple[str, int], Call] = {}
    for context in contexts:
        q, k, v = (random_heads(context, device, dtype) for _ in range(3))
        _, state = nala_attention(q, k, v, **options)
        cache = [torch.cat([x] + BURST * [y], dim=2) for x, y in ((k, token[1]), (v, token[2]))]
        calls |= {
            ("softmax", context): partial(attend, *cache, context),
            ("softmax_grown", context): partial(grow, ATTENTIONS["softmax"], (k, v)),
            ("nala", context): partial(grow, ATTENTIONS["nala"], state),
        }
    with torch.no_grad():
        rows = take_turns(calls, device, budget)
    shared = ("median", "low", "high", "bytes", "flops")
    per_token = {
        name: {key: row[key] / BURST for key in shared if key in row} for name, row in rows.items()
    }
    return [
        {"form": form, "context": context, **row, **per_token[form, context]}
        for (form, context), row in rows.items()
    ]


def step_rows(windows: dict[int, int], device: torch.device, budget: float) -> list[Row]:
    """A training step of NaLaLM at its default sizes, with AdamW in float32, for each attention.
    windows: {window length: batch size}."""
    found = []
    for block, batch in windows.items():
        tokens = torch.randint(65, (batch, block + 1), device=device)
        calls = {name: training_step(name, tokens, device) for name in ("softmax", "nala", "elu")}
        for name, row in take_turns(calls, device, budget).items():
            found.append({"form": name, "block": block, "batch": batch, **row})
    return found


def training_step(attention: str, tokens: Tensor, device: torch.device) -> Call:
    """A call that trains a model of the default size for one step. tokens: (B, N + 1)."""
    torch.manual_seed(0)
    model = NaLaLM(LMConfig(vocab_size=65, attention=attention)).to(device)
    recipe = train.Recipe(steps=1000, learning_rate=1e-3)
    optimizers = train.make_optimizers(model, recipe)

    def step() -> None:
        loss = next_token_loss(model, tokens[:, :-1], tokens[:, 1:])
        train.update(model, optimizers, loss, recipe.clip)

    return step


# --- Other libraries ------------------------------------------------------------------------------


def peers(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Causal linear attention, normalised, from this package and from each installed library, as
    functions of phi_q, phi_k and v. The kernels of flash-linear-attention (fla) need CUDA."""
    found = {"nala": partial(nala_attention, causal=True, feature_map="relu")}
    if find_spec("fla"):
        from fla.ops.linear_attn import chunk_linear_attn
        from fla.ops.linear_attn.naive import naive_chunk_linear_attn

        def fla(attention: Callable, *inputs: Tensor) -> Tensor:  # tokens before heads
            out = attention(*(x.transpose(1, 2) for x in inputs), 1, normalize=True)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # or with a state

        if device.type == "cuda":
            found["fla_chunk"] = partial(fla, chunk_linear_attn)
        found["fla_naive_chunk"] = partial(fla, naive_chunk_linear_attn)
    if find_spec("fast_transformers"):
        from fast_transformers.causal_product import causal_dot_product

        def fast_transformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            normaliser = torch.einsum("bhnf,bhnf->bhn", q, k.cumsum(dim=2))
            return causal_dot_product(q, k, v) / normaliser[..., None]

        found["fast_transformers"] = fast_transformers
    if find_spec("performer_pytorch"):
        from performer_pytorch.performer_pytorch import causal_linear_attention_noncuda

        found["performer_pytorch"] = causal_linear_attention_noncuda
    return found


def peer_rows(
    shapes: dict[int, Shape], device: torch.device, dtype: torch.dtype, budget: float
) -> Iterator[list[Row]]:
    """Yield the rows of all libraries for each number of tokens, with heads first in memory. Raises
    AssertionError if an output differs from ours."""
    tolerance = 1e-3 if device.type == "cpu" else 1e-2  # fla's kernels multiply in TF32
    tolerance = max(tolerance, 4 * torch.finfo(dtype).eps)
    for length, shape in shapes.items():
        q, k, v = (random_heads(length, device, dtype, shape).contiguous() for _ in range(3))
        features = query_features(q).to(dtype), key_features(k).to(dtype)
        inputs = [x.requires_grad_() for x in (*features, v)]
        calls, expected = {}, None
        for name, attention in peers(device).items():
            with torch.no_grad():
                out = attention(*inputs)
            expected = out if expected is None else expected
            torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance / 10)
            for what, call in passes(attention, inputs).items():
                calls[name, what] = call
        yield [
            {"form": name, "pass": what, "length": length, "causal": True, "shape": shape, **row}
            for (name, what), row in take_turns(calls, device, budget).items()
        ]


# --- Table, card, picture -------------------------------------------------------------------------


def table(rows: list[Row], reference: str = "softmax") -> str:
    """One line per row: the case, milliseconds, speed relative to reference, and peak memory."""
    (axis_name,) = (name for name in ("length", "context", "block") if name in rows[0])
    lines = []
    for row in rows:
        case = {name: row[name] for name in (axis_name, "causal", "pass") if name in row}
        (reference_row,) = select(rows, form=reference, **case)
        middle, low, high = (1000 * row[name] for name in ("median", "low", "high"))
        lines.append(
            f"{row[axis_name]:7,} {row.get('pass', ''):19}{row['form']:18}{middle:10.3f} ms"
            f" ({low:.3f} to {high:.3f}) {reference_row['median'] / row['median']:8.2f} x"
            + ("" if row["peak"] is None else f" {row['peak'] / 2**20:9.2f} MiB")
            + (rate(row, row["median"]) if "flops" in row else "")
        )
    return "\n".join(lines)


def rate(work: Row, seconds: float = 1) -> str:
    """Bytes and operations per second."""
    return (
        f"{work['bytes'] / seconds / 1e9:8,.0f} GB/s {work['flops'] / seconds / 1e12:8.2f} TFLOP/s"
    )


def measure(settings: Settings, device: torch.device) -> dict[str, Any]:
    """Measure what settings select and print it as it arrives. Returns the run card's results."""
    dtype = getattr(torch, settings.dtype)
    budget = 0.5 if settings.quick else 4.0 if device.type == "cpu" else 1.0
    lengths = [2**i for i in range(6, 13 if settings.quick else 17)]
    rows: list[Row] = []
    results: Row = {}
    if device.type != "cpu":
        results["limits"] = limits(device, dtype, budget)
        print(f"A large copy and a large matrix product: {rate(results['limits'])}\n")
    if settings.peers:
        print("Linear attention on the same features; the reference is ours")
        same = dict.fromkeys(lengths[4:-2], (BATCH, HEADS, DIM))
        shapes = sizes_of_inputs(settings, device).get("shapes", same)
        for new_rows in peer_rows(shapes, device, dtype, budget):
            rows += new_rows
            print(table(new_rows, reference="nala"))
        return results | {"peers": rows}
    if settings.segments:
        default = fast.SEGMENT if device.type == "cpu" else fast.LARGE_SEGMENT
        rows = segment_rows(lengths[-1], device, dtype, budget)
        print("Segment sizes; the reference is the default of fast.py")
        print(table(rows, reference=f"2^{default.bit_length() - 1}"))
        return results | {"segments": rows}
    if settings.long:
        results["steps"] = step_rows(LONG_WINDOWS, device, budget)
        print(
            "One training step, with windows of N; the reference is softmax",
            table(results["steps"]),
            sep="\n",
        )
        results["long"] = long_rows(device, dtype, budget)
        print("\nBidirectional attention", table(results["long"][:2]), sep="\n")
        print(f"Softmax written out would need {results['long'][2]['peak'] / 2**30:.1f} GiB")
        return results
    compiled = not settings.quick and train.can_compile(device)
    for new_rows in attention_rows(lengths, device, dtype, budget, compiled):
        rows += new_rows
        direction = "Causal" if new_rows[0]["causal"] else "Bidirectional"
        print(f"\n{direction} attention; the reference is PyTorch's fused softmax")
        print(table(new_rows))
    crossovers = {}
    for direction, causal in (("causal", True), ("bidirectional", False)):
        for name in ("forward", "forward + backward"):
            crossovers[f"{direction}, {name}"] = crossover(rows, causal=causal, **{"pass": name})
    print("\nNumber of tokens from which NaLa is never slower:")
    for name, length in crossovers.items():
        print(f"  {name}: {length}")
    results |= {"attention": rows, "crossover": crossovers}
    results["decode"] = decode_rows(lengths[::2], device, dtype, budget)
    print("\nTime per decoded token, after a context of N", table(results["decode"]), sep="\n")
    results["steps"] = step_rows(WINDOWS, device, budget)
    print("\nOne training step, with windows of N", table(results["steps"]), sep="\n")
    return results


def card_name(settings: Settings, device: torch.device) -> str:
    """The run card's file name without .json. Raises UsageError if the flags do not fit."""
    mode = next((m for m in ("peers", "long", "segments") if getattr(settings, m)), None)
    if mode and settings.dtype != "float32" and device.type == "cpu":
        raise UsageError(f"--dtype must be float32 with --{mode} on a CPU, got {settings.dtype}")
    parts = [mode, settings.dtype] if settings.dtype != "float32" else [mode or "float32"]
    return "_".join(["speed", device.type, *filter(None, parts)])


def sizes_of_inputs(settings: Settings, device: torch.device) -> Row:
    """The sizes of q, k and v, for the run card."""
    if settings.peers and device.type == "cuda":
        return {"shapes": PEER_SHAPES}
    return {"batch": BATCH, "heads": HEADS, "dim": DIM}


def main() -> None:
    start, settings = time.perf_counter(), parse_flags(Settings)
    device = train.choose_device(settings.device)
    torch.manual_seed(1)
    name = card_name(settings, device)
    runcard.check_writable(settings.out / f"{name}.json", settings.out / f"{name}.png")
    config = {"seed": 1, **sizes_of_inputs(settings, device), "dtype": settings.dtype}
    print(f"PyTorch {torch.__version__}, {device}, {torch.get_num_threads()} threads;", end=" ")
    print(f"q, k, v: {', '.join(f'{name} {x}' for name, x in config.items() if name != 'seed')}")
    print(METHOD)
    print("N, case, median (lowest to highest), speed relative to the reference, peak memory\n")
    results = measure(settings, device)
    data = {"name": "standard normal queries, keys and values"}
    card = runcard.run_card(config, data, device, time.perf_counter() - start, results)
    card["command"] = card["command"].replace("bench.py", "-m nala_min.lab.bench")
    runcard.write_json(settings.out / f"{name}.json", card)
    if "attention" in results:
        plots.write(plots.speed(results), settings.out / f"{name}.png")
    print(f"\nWritten to {settings.out}: {name}")


if __name__ == "__main__":
    run_script(main)
