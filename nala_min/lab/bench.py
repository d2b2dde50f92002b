"""Speed and memory of NaLa and the fused softmax, over more and more tokens, and of decoding after
longer and longer contexts. `python -m nala_min.lab.bench` writes a run card and a picture."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nala_min import nala_attention, plots, runcard, softmax_attention, train
from nala_min.flags import flag, parse_flags, run_script
from nala_min.measure import Recorder

Call = Callable[[], Any]
Row = dict[str, Any]
BATCH, HEADS, DIM = 1, 4, 64
BURST = 128  # tokens to decode in a row


@dataclass
class Settings:
    """Measure the speed and memory of attention and of decoding."""

    quick: bool = flag(False, "up to 4,096 tokens, and fewer repetitions: under a minute")
    device: str = flag("auto", "device to measure", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = flag("float32", "of q, k and v", choices=["float32", "bfloat16", "float16"])
    out: Path = flag(Path("runs/speed"), "folder for the run card and the picture")


def seconds_of(call: Call, device: torch.device) -> float:
    """Wall time of one call, including launches. On a CUDA card the caches are flushed first."""
    if device.type == "cuda":
        torch.empty(2**28, dtype=torch.int8, device=device).zero_()  # larger than any cache
    wait = (lambda: None) if device.type == "cpu" else getattr(torch, device.type).synchronize
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def take_turns(calls: dict[Any, Call], device: torch.device, budget: float) -> dict[Any, Row]:
    """Time calls in turn, so a slow minute slows all, until budget seconds have passed: 3 to 50
    times each, or once if that exceeds the budget. Each timed run follows one that is not. Returns
    for each call its seconds, number of runs, and peak bytes of tensors (None if compiled)."""
    timings, rows = {}, {}
    for name, call in calls.items():  # the first turn
        with nullcontext() if "compiled" in name else Recorder() as recorder:
            call()
        rows[name] = {"peak": recorder and recorder.peak}
        timings[name] = [seconds_of(call, device)]
    repeated = {name: call for name, call in calls.items() if timings[name][0] <= budget}
    start, turns = time.perf_counter(), 1
    while repeated and turns < 50 and (turns < 3 or time.perf_counter() - start < budget):
        for name, call in repeated.items():
            call()
            timings[name].append(seconds_of(call, device))
        turns += 1
    for name, x in timings.items():
        rows[name] |= {"median": median(x), "low": min(x), "high": max(x), "runs": len(x)}
    return rows


def select(rows: list[Row], **values: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def forms(causal: bool, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """The forms to compare, each a function of q, k and v."""
    attention = partial(nala_attention, causal=causal)
    found = {
        "softmax": partial(softmax_attention, causal=causal),
        "nala": attention,
        "split": partial(attention, feature_map="split"),
        "readable": partial(attention, mode="chunked" if causal else "parallel"),
    }
    if causal:
        found["quadratic"] = partial(attention, mode="quadratic")
    if compiled:
        torch._dynamo.reset()  # one kernel per length
        found["compiled"] = torch.compile(attention, fullgraph=True, dynamic=False)
    return found


def passes(form: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Call]:
    """The two calls to time: the forward pass alone, and both passes."""
    forward = torch.no_grad()(partial(form, *inputs))
    grad_output = torch.ones_like(forward())

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(form(*inputs), inputs, grad_output, allow_unused=True)

    return {"forward": forward, "forward + backward": forward_backward}


def heads(length: int, **kind: Any) -> list[Tensor]:
    """Random q, k and v, (B, H, N, D), with all heads of a token side by side, as in a model."""
    shape = (BATCH, length, HEADS, DIM)
    return [torch.randn(shape, **kind).transpose(1, 2).requires_grad_() for _ in range(3)]


def decode_calls(context: int, **kind: Any) -> dict[Any, Call]:
    """Calls that decode BURST tokens. "nala" carries its state. "softmax_grown" appends to its keys
    and values, as our model does. "softmax" has a preallocated cache, so nothing is copied."""
    token, (q, k, v) = heads(1, **kind), heads(context, **kind)
    options = {"causal": True, "return_state": True}
    cache = [torch.cat([x] + BURST * [y], dim=2) for x, y in ((k, token[1]), (v, token[2]))]
    _, first_state = nala_attention(q, k, v, **options)

    def carry(attention: Callable, state: Any) -> Tensor:
        for _ in range(BURST):
            out, state = attention(*token, state=state, **options)
        return out

    def attend() -> Tensor:
        for seen in range(context + 1, context + BURST + 1):
            out = F.scaled_dot_product_attention(token[0], *(x[:, :, :seen] for x in cache))
        return out

    return {
        ("softmax", context): attend,
        ("softmax_grown", context): partial(carry, softmax_attention, (k, v)),
        ("nala", context): partial(carry, nala_attention, first_state),
    }


def crossover(rows: list[Row], form: str = "nala") -> int | None:
    """The length from which form's causal training pass is never slower than softmax's, or None."""
    case = {"causal": True, "pass": "forward + backward"}
    softmax = {x["length"]: x["median"] for x in select(rows, form="softmax", **case)}
    times = {x["length"]: x["median"] for x in select(rows, form=form, **case)}
    slower = max((n for n, time in times.items() if time > softmax[n]), default=0)
    return min((n for n in times if n > slower), default=None)


def table(rows: list[Row]) -> str:
    """One line per row: the case, milliseconds, speed relative to softmax, peak memory."""
    lines = []
    for row in rows:
        case = {x: row[x] for x in ("length", "context", "causal", "pass") if x in row}
        (softmax,) = select(rows, form="softmax", **case)
        middle, low, high = (1000 * row[name] for name in ("median", "low", "high"))
        speed = softmax["median"] / row["median"]
        lines.append(
            f"{next(iter(case.values())):7,} {row.get('pass', ''):19}{row['form']:14}"
            f"{middle:10.3f} ms ({low:.3f} to {high:.3f}) {speed:8.2f} x"
            + ("" if row["peak"] is None else f" {row['peak'] / 2**20:9.2f} MiB")
        )
    return "\n".join(lines)


def main() -> None:
    start, settings = time.perf_counter(), parse_flags(Settings)
    device = train.choose_device(settings.device)
    name = f"speed_{device.type}_{settings.dtype}"
    card_file, picture = settings.out / f"{name}.json", settings.out / f"{name}.png"
    runcard.check_writable(card_file, picture)
    torch.manual_seed(1)
    config = {"seed": 1, "batch": BATCH, "heads": HEADS, "dim": DIM, "dtype": settings.dtype}
    print("N, pass, form, median (lowest to highest), speed relative to softmax, peak memory")
    budget = 0.5 if settings.quick else 4.0 if device.type == "cpu" else 1.0
    lengths = [2**i for i in range(6, 13 if settings.quick else 17)]
    kind = {"device": device, "dtype": getattr(torch, settings.dtype)}
    compiled = not settings.quick and bool(device.type == "cuda" or shutil.which("c++"))
    results: dict[str, Any] = {"attention": [], "decode": []}
    for length, causal in product(lengths, (True, False)):
        inputs, calls = heads(length, **kind), {}
        for form, attention in forms(causal, compiled).items():
            if form != "quadratic" or length <= 2**11:  # else it would slow down the others
                calls |= {(form, name): x for name, x in passes(attention, inputs).items()}
        case = {"length": length, "causal": causal}
        for (form, name), row in take_turns(calls, device, budget).items():
            results["attention"].append({"form": form, "pass": name, **case, **row})
        rows = select(results["attention"], **case)
        print("Causal" if causal else "Bidirectional", table(rows), sep="\n")
    with torch.no_grad():
        calls = {}
        for context in lengths[::2]:
            calls |= decode_calls(context, **kind)
        timed = take_turns(calls, device, budget)
    for (form, context), row in timed.items():
        per_token = {name: row[name] / BURST for name in ("median", "low", "high")}
        results["decode"].append({"form": form, "context": context, **row, **per_token})
    print("Decoding, per token, after a context of N", table(results["decode"]), sep="\n")
    results["crossover"] = {"causal, forward + backward": crossover(results["attention"])}
    print("Number of tokens from which NaLa is never slower:", results["crossover"])
    data = {"name": "standard normal queries, keys and values"}
    card = runcard.run_card(config, data, device, time.perf_counter() - start, results)
    card["command"] = card["command"].replace("bench.py", "-m nala_min.lab.bench")
    runcard.write_json(card_file, card)
    plots.write(plots.speed(results), picture)
    print(f"\nWritten: {card_file}")


if __name__ == "__main__":
    run_script(main)
