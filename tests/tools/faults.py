"""Break training runs in every way that happens in practice: what is lost?

`python tests/tools/faults.py` takes half an hour and writes notebooks/results/faults.json for the
results page; `--times 1` is quick. "Lost" is each difference between a run that was broken and
resumed and one that was not, and the whole output of a run that should not have failed.
"""

import argparse
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

sys.path.insert(0, str(Path(__file__).parents[2]))

from nala_min import data, runcard, synthetic, train
from nala_min.flags import run_script

COUNT = 200  # images per file, instead of 10,000
SIZES = "--preset cpu --device cpu --layers 1 --heads 2 --dim 32 --steps 60 --dropout 0.1".split()
FLAGS = {
    "train_shakespeare": [*SIZES, *"--batch 4 --block 32 --data text.txt".split()],
    "train_cifar": [*SIZES, *"--batch 20 --shift 1 --data-dir images".split()],
}
PLAIN = ("--dropout", 0)  # dropout depends on the number of processes
PHASES = {  # each a function, and about how many calls a run makes within it
    "training": (train.fit, 400_000),
    "evaluation": (train.Run.add_point, 400_000),
    "writing": (train.write_atomically, 1500),
}


def prepare(folder):
    """Write a text and noise images for the scripts to train on."""
    (folder / "text.txt").write_text(synthetic.python_manual()[:100_000], encoding="utf-8")
    (folder / "images").mkdir()
    noise = np.random.default_rng(1).integers(256, size=(6, COUNT, 3073), dtype=np.uint8)
    noise[:, :, 0] %= 10  # labels
    for name, records in zip(data.CIFAR10_FILES, noise, strict=True):
        (folder / "images" / name).write_bytes(records.tobytes())


# --- Runs -----------------------------------------------------------------------------------------


def child(script, sent="", phase="", count="", rank=""):
    """Run script. With sent, send this process that signal at the count-th call within a phase,
    after the first checkpoint."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even if nohup started faults.py
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or a shell, in the background
    module = importlib.import_module(script)
    data.IMAGES_PER_FILE = COUNT
    codes = {function.__code__: name for name, (function, _) in PHASES.items()}
    began, phases = False, [""]

    def at_call(frame, event, arg):
        nonlocal count, began
        began |= frame.f_code is train.Run.begin.__code__ and event == "return"
        if frame.f_code in codes and event in ("call", "return"):
            phases.append(codes[frame.f_code]) if event == "call" else phases.pop()
        count -= began and "training" in phases and phases[-1] == phase
        if count == 0:
            sys.setprofile(None)
            os.write(2, b"\nFAULT\n")
            os.kill(os.getpid(), getattr(signal, sent))

    if sent and os.environ.get("RANK", "0") == rank:
        count = int(count)
        sys.setprofile(at_call)
    run_script(module.main)


def run(script, folder, name, *flags, processes=1, fault=()):
    """Run script in folder, from its checkpoint if there is one; with torchrun, if in several
    processes. fault: further arguments of child. Returns its exit code and output."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    torchrun += ["--local-addr=127.0.0.1"]  # the host name may not resolve
    variables = {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "GLOO_SOCKET_IFNAME": "lo"}
    variables["CHILD"] = " ".join(map(str, [script, *fault]))
    flags = [*FLAGS[script], "--out", name, *map(str, flags)]
    flags += ["--resume"] * (folder / name / "checkpoint.pt").exists()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *torchrun * (processes > 1), __file__, *flags],
            **{"cwd": folder, "env": os.environ | variables, "start_new_session": True},
            **{"stdout": log, "stderr": log},
        )
    try:
        process.wait(600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait(), (folder / "log.txt").read_text(encoding="utf-8", errors="replace")


def results_of(folder, name):
    return runcard.read_json(folder / name / "card.json")["results"]


def differences(folder, one, other):
    """What is not equal bit for bit in what two finished runs leave, by path. Not their times."""

    def leaves(name):
        saved = train.load_checkpoint(folder / name / "checkpoint.pt") | {"seconds": 0}
        pairs, _ = tree_flatten_with_path(saved | {"card": results_of(folder, name)})
        return {keystr(path): getattr(x, "tolist", lambda x=x: x)() for path, x in pairs}

    first, second = leaves(one), leaves(other)
    return [path for path in first | second if first.get(path) != second.get(path)]


def max_difference(folder, one, other):
    """The largest difference between the curves of two finished runs."""
    curves = (results_of(folder, name)["history"] for name in (one, other))
    return max(abs(a[key] - b[key]) for a, b in zip(*curves, strict=True) for key in a)


def refused(code, text, words):
    """[], or text, if it is not the one line, with words, of a run that was refused."""
    one_line = "Traceback" not in text and words in text.rstrip().rsplit("\n", 1)[-1]
    return [] if code in (1, 2) and one_line else [text]


# --- Faults of one run: each breaks the run in folder / name. Returns what it hit, None if the run
# was over before, and what was lost.


def send(signals, script, folder, name, rng, hits):
    """One of signals at a random call within the phase that was hit least often."""
    sent, phase = signals[len(hits) % len(signals)], min(PHASES, key=hits.count)
    fault = (sent, phase, rng.randint(1, PHASES[phase][1]), 0)
    code, text = run(script, folder, name, fault=fault)
    if "\nFAULT\n" not in text:
        return None, [] if code == 0 else [text]
    clear = code == 130 and ": --resume continues from" in text.rstrip().rsplit("\n", 1)[-1]
    return phase, [] if clear or (sent == "SIGKILL" and code == -9) else [text]


def fill_disk(script, folder, name, rng, hits):
    """The first or a later checkpoint goes to /dev/full, a device that is always full."""
    if len(hits) % 2:
        run(script, folder, name, fault=("SIGKILL", "evaluation", 1, 0))
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "checkpoint.pt.part").symlink_to("/dev/full")
    return "writing", refused(*run(script, folder, name), "No space left on device")


def repeat(fault, script, folder, times, rng, chain=1):
    """Break runs, each up to chain times, until fault hit times times; let each run finish."""
    hits, lost = [], []
    while len(hits) < times:
        for _ in range(chain):
            hit, unsaved = fault(script, folder, "broken", rng, hits)
            hits, lost = hits + [hit] * (hit is not None), lost + unsaved
        code, text = run(script, folder, "broken")
        lost += differences(folder, "whole", "broken") if code == 0 else [text]
        lost += [path.name for path in (folder / "broken").glob("*.part")]
        shutil.rmtree(folder / "broken")
    phases = {phase: hits.count(phase) for phase in PHASES}
    return {"times": len(hits), "lost": lost, "phases": phases}


# --- Other faults ---------------------------------------------------------------------------------


def bad_checkpoints(script, folder, times, rng):
    """Resume with other flags, and from damaged checkpoints: refused, and not overwritten."""
    lost = refused(*run(script, folder, "whole", "--lr", 0.5), "was trained with lr = ")
    path = folder / "whole" / "checkpoint.pt"
    whole, saved = path.read_bytes(), torch.load(path)
    bit = whole.index(saved["model"]["head.weight"].numpy().tobytes())
    damaged = [whole[:bit], b"", b"garbage\n" * 999]
    damaged += [whole[:bit] + bytes([whole[bit] ^ 1]) + whole[bit + 1 :]]
    for value in ({"model": argparse.Namespace()}, saved | {"format": 1}):
        torch.save(value, path)
        damaged.append(path.read_bytes())
    for content in damaged:
        path.write_bytes(content)
        lost += refused(*run(script, folder, "whole"), "cannot be read")
        lost += ["overwritten"] * (path.read_bytes() != content)
    path.write_bytes(whole)
    return {"times": len(damaged) + 1, "lost": lost}


def killed_workers(script, folder, times, rng):
    """kill -9 of one of two processes, then --resume with 1, 2 or 4. Compared with one process and
    two that were not killed."""
    ends = [run(script, folder, name, *PLAIN, processes=n) for name, n in (("one", 1), ("two", 2))]
    if lost := [text for code, text in ends if code]:
        return {"times": 0, "lost": lost}
    gaps = [max_difference(folder, "one", "two")]
    for i in range(times):
        name, count = f"worker{i}", (1, 2, 4)[i % 3]
        fault = ("SIGKILL", "training", rng.randint(100_000, 300_000), rng.randrange(2))
        code, text = run(script, folder, name, *PLAIN, processes=2, fault=fault)
        lost += [] if code and "SIGKILL" in text else [text]
        code, text = run(script, folder, name, *PLAIN, processes=count)
        lost += [text] if code else differences(folder, "two", name) if count == 2 else []
        gaps += [] if code else [max_difference(folder, "one", name)]
    return {"times": times, "lost": lost, "difference": max(gaps)}


# --- The table and the card -----------------------------------------------------------------------

RESUME = "then `--resume`"
FAULTS = {  # name: how it is tried, and the row of the results page: the fault, how it was tried
    "kill -9": (
        partial(repeat, partial(send, ["SIGKILL"]), chain=4),
        f"`kill -9` | at random moments of {{phases}}; {RESUME}",
    ),
    "stop": (
        partial(repeat, partial(send, ["SIGINT", "SIGTERM", "SIGHUP"])),
        f"Ctrl-C, SIGTERM or a closed terminal (SIGHUP) | at random moments; {RESUME}",
    ),
    "full disk": (
        partial(repeat, fill_disk),
        f"a full disk | the first or a later checkpoint goes to `/dev/full`; {RESUME}",
    ),
    "bad checkpoint": (
        bad_checkpoints,
        "a bad checkpoint | truncated, empty, garbage, one bit, code in a pickle, another version,"
        " other flags: refused in one line",
    ),
    "killed worker": (
        killed_workers,
        "one of two processes killed | then `--resume` with 2, 1 or 4: the same bits with 2, else"
        " curves at most {far} apart",
    ),
}


def table(results):
    """The rows of the results page's table: fault, how it was tried, how often, what was lost."""
    rows = []
    for name, (_, columns) in FAULTS.items():
        parts = [of_script[name] for of_script in results.values()]
        phases = {x: sum(part.get("phases", {}).get(x, 0) for part in parts) for x in PHASES}
        columns = columns.format(
            phases=", ".join(f"{phase} ({count})" for phase, count in phases.items()),
            far=f"{max(part.get('difference', 0) for part in parts):.0e}",
        )
        times, lost = (sum(part["times"] for part in parts), sum(len(p["lost"]) for p in parts))
        rows.append(f"| {columns} | {times} | {lost or 'nothing'} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--times", type=int, default=24, help="tries per script and fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=runcard.RESULTS)
    settings = parser.parse_args()
    runcard.check_writable(settings.out / "faults.json")
    begin, rng, results = time.perf_counter(), random.Random(settings.seed), {}
    for script in FLAGS:
        results[script] = {}
        with tempfile.TemporaryDirectory() as folder:
            prepare(folder := Path(folder))
            run(script, folder, "whole")
            for name, (fault, _) in FAULTS.items():
                times = settings.times if name == "kill -9" else max(1, settings.times // 4)
                results[script][name] = fault(script, folder, times, rng)
                print(f"{script}, {name}: {results[script][name]}", flush=True)
    print(table(results))
    config = {"times": settings.times, "seed": settings.seed, "flags": FLAGS}
    info, seconds = {"name": "Python manual, and images of noise"}, time.perf_counter() - begin
    card = runcard.run_card(config, info, torch.device("cpu"), seconds, results)
    card["command"] = card["command"].replace("faults.py", "tests/tools/faults.py")
    runcard.write_json(settings.out / "faults.json", card)


if __name__ == "__main__":
    if job := os.environ.pop("CHILD", ""):
        name, *fault = job.split()
        sys.argv[0] = f"{name}.py"
        child(name, *fault)
    else:
        run_script(main)
