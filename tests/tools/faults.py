"""Break the training scripts and compare in every way that happens in practice: what is lost?

`python tests/tools/faults.py` tries every fault (half an hour on two cores) and writes the run card
for the table on the results page, notebooks/results/faults.json. `--times 2` is quick; `--out`
names another folder. Faults come at random moments, reproducible with `--seed` as far as timing
allows. test_faults.py calls the same functions. "Lost" is every difference between a run that was
broken and resumed and a run that was not.
"""

import argparse
import importlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from nala_min import data, runcard, synthetic, train  # noqa: E402
from nala_min.flags import UsageError, run_script  # noqa: E402

SCRIPTS = ("train_shakespeare", "train_cifar")
PHASES = ("training", "evaluation", "writing")
COUNT = 200  # images per file, instead of 10,000
SIZES = "--preset cpu --device cpu --layers 1 --heads 2 --dim 32 --steps 60 --dropout 0.1".split()
FLAGS = {
    "train_shakespeare": [*SIZES, *"--batch 4 --block 32 --data text.txt".split()],
    "train_cifar": [*SIZES, *"--batch 20 --shift 1 --data-dir images".split()],
    "compare": "--study sharpness --workers 2".split(),
}
COMPARED = ("nala", "elu")  # one seed each
COMPARE_STEPS = 1000
# How to end compare: with a signal, or with kill -9 of one of its workers.
ENDS = ("SIGKILL", "a worker", "SIGINT", "SIGTERM", "SIGHUP")


# --- Inputs and jobs ------------------------------------------------------------------------------


def prepare(folder):
    """Write a text and noise images for the scripts to train on."""
    (folder / "text.txt").write_text(synthetic.python_manual()[:100_000], encoding="utf-8")
    (folder / "images").mkdir()
    noise = np.random.default_rng(1)
    for name in data.CIFAR10_FILES:
        records = noise.integers(256, size=(COUNT, data.BYTES_PER_IMAGE), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / "images" / name).write_bytes(records.tobytes())


def child(script, phase, flags):
    """Run script in this process. A byte in the file phase names its current phase."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even if nohup started faults.py
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or a shell, in the background
    module = importlib.import_module(f"nala_min.lab.{script}" if script == "compare" else script)
    if script == "compare":
        study = module.STUDIES["sharpness"]
        task = replace(study.task, steps=COMPARE_STEPS)
        module.STUDIES["sharpness"] = replace(study, task=task, variants=COMPARED, seeds=1)
    data.IMAGES_PER_FILE = COUNT

    def during(name, function):
        def wrapper(*args, **options):
            before = os.pread(descriptor, 1, 0)
            os.pwrite(descriptor, name[:1].encode(), 0)
            try:
                return function(*args, **options)
            finally:
                os.pwrite(descriptor, before, 0)

        return wrapper

    if phase:
        descriptor = os.open(phase, os.O_RDWR | os.O_CREAT)
        os.pwrite(descriptor, b"-", 0)
        train.fit = during("training", train.fit)
        train.Run.add_point = during("evaluation", train.Run.add_point)
        train.write_atomically = during("writing", train.write_atomically)
    sys.argv = [f"{script}.py", *flags]
    run_script(module.main)


class Job:
    """A script that trains in folder / name, in one process or, with torchrun, in several. output:
    its stdout, instead of the file that wait reads."""

    def __init__(self, script, folder, name, *flags, processes=1, output=None):
        self.checkpoint = folder / name / "checkpoint.pt"
        has_phases = script in SCRIPTS and processes == 1
        self.phase_file = folder / f"phase{random.getrandbits(48)}" if has_phases else None
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *torchrun * (processes > 1), __file__, "--child", script]
        flags = [*FLAGS[script], "--out", name, *map(str, flags)]
        self.log = (folder / "log.txt").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [*command, str(self.phase_file or ""), *flags],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
            stdout=output or self.log,
            stderr=subprocess.STDOUT,
            start_new_session=script == "compare",
        )

    def phase(self):
        """The current one of PHASES, or None outside of them."""
        letter = self.phase_file.read_bytes()[:1].decode() if self.phase_file.exists() else "-"
        return next((name for name in PHASES if name[:1] == letter), None)

    def until(self, reached, *values):
        """Wait until reached() is one of values. Returns whether the job is still running."""
        while self.process.poll() is None:
            if reached() in values:
                return True
            time.sleep(0.0005)
        return False

    def wait(self):
        """Wait for the end of the job. Returns its exit code and its output."""
        code = self.process.wait(timeout=600)
        self.log.seek(0)
        text = self.log.read()
        self.log.close()
        if self.phase_file:
            self.phase_file.unlink(missing_ok=True)
        return code, text


def run(script, folder, name, *flags, processes=1):
    """Run script to its end, from its checkpoint if there is one. Returns its exit code and its
    output."""
    has_checkpoint = (folder / name / "checkpoint.pt").exists() and script in SCRIPTS
    resume = ["--resume"] * has_checkpoint
    return Job(script, folder, name, *flags, *resume, processes=processes).wait()


def lost_after(script, folder, name, *flags, processes=1, whole="whole"):
    """Run script to its end. Returns what differs from the run that was not broken."""
    code, text = run(script, folder, name, *flags, processes=processes)
    return differences(folder, whole, name) if code == 0 else [text[-300:]]


# --- Losses ---------------------------------------------------------------------------------------


def tensors_of(value, name=""):
    """Every tensor in nested dicts and lists, by its path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        path: tensor
        for key, item in items
        if isinstance(item, torch.Tensor | dict | list)
        for path, tensor in tensors_of(item, f"{name}/{key}").items()
    }


def differences(folder, one, other):
    """Names of the parts that are not equal bit for bit in two finished runs: model, optimisers,
    history, the card's results. Times are not compared."""
    saved = [train.load_checkpoint(folder / name / "checkpoint.pt") for name in (one, other)]
    differing = [name for name in saved[0] if name != "seconds" and name not in saved[1]]
    first, second = (tensors_of(each) for each in saved)
    differing += [name for name in first.keys() ^ second.keys()]
    differing += [
        name for name in first.keys() & second.keys() if not first[name].equal(second[name])
    ]
    differing += [n for n in ("step", "history", "extra") if saved[0][n] != saved[1][n]]
    cards = [runcard.read_json(folder / name / "card.json") for name in (one, other)]
    differing += ["card"] * (cards[0]["results"] != cards[1]["results"])
    return differing


def max_difference(folder, one, other):
    """The largest difference between the curves of two finished runs."""
    curves = [runcard.read_json(folder / name / "card.json")["results"] for name in (one, other)]
    points = zip(*(curve["history"] for curve in curves), strict=True)
    return max(abs(a[key] - b[key]) for a, b in points for key in a)


# --- The faults -----------------------------------------------------------------------------------


def kills(script, folder, times, rng):
    """kill -9 at random moments, then --resume; after a few kills, let the run finish.

    Returns how often each phase was hit, and what the finished runs lost.
    """
    hit, lost, chains = dict.fromkeys(PHASES, 0), [], 0
    while sum(hit.values()) < times:
        name, chains = f"chain{chains}", chains + 1
        for _ in range(min(4, times)):
            target = min(PHASES, key=lambda phase: (hit[phase], rng.random()))
            resume = ["--resume"] * (folder / name / "checkpoint.pt").exists()
            job = Job(script, folder, name, *resume)
            job.until(job.phase, *PHASES)
            time.sleep(rng.uniform(0, 0.25))
            if running := job.until(job.phase, target):
                time.sleep(rng.uniform(0, 0.003))
                job.process.kill()
            phase = job.phase()
            job.wait()
            if not running:  # it finished first
                break
            if phase:
                hit[phase] += 1
        lost += lost_after(script, folder, name)
        lost += [path.name for path in (folder / name).glob("*.part")]
    return hit, lost


def stops(script, folder, times, rng, signals=("SIGINT", "SIGTERM")):
    """Send signals in turn, at random moments of training. Returns how often, and what was lost."""
    lost, tried, started = [], 0, 0
    while tried < times:
        sent = signals[tried % len(signals)]
        name, started = f"stop{started}{sent}", started + 1
        job = Job(script, folder, name)
        job.until(job.checkpoint.exists, True)
        time.sleep(rng.uniform(0, 0.5))
        if stopped := job.phase() is not None:
            job.process.send_signal(getattr(signal, sent))
        code, text = job.wait()
        if not stopped:  # it finished first
            continue
        tried += 1
        last = text.rstrip().rsplit("\n", 1)[-1]
        if code != 130 or not last.split(": ")[-1].startswith("--resume continues from"):
            lost.append(f"no hint on how to continue: {last[-200:]}")
        if len(set(re.findall(r" step (\d+)", last))) > 1:
            lost.append(f"steps: {last[-200:]}")
        lost += lost_after(script, folder, name)
    return tried, lost


def broken_pipes(script, folder, times, rng):
    """Stop reading the output after a few lines, like `| head -1`; then --resume. Returns the same
    as stops."""
    lost = []
    for i in range(times):
        read, write = os.pipe()
        job = Job(script, folder, f"pipe{i}", output=write)
        os.close(write)
        with open(read, "rb") as reader:
            for _ in range(rng.randrange(4)):
                reader.readline()
        code, _ = job.wait()
        lost += lost_after(script, folder, f"pipe{i}") if code in (0, 1) else [f"exit code {code}"]
    return times, lost


def full_disk(script, folder, times, rng):
    """Write the first or a later checkpoint to /dev/full, a device that is always full."""
    lost, tried = [], 0
    for i in range(times):
        part = folder / f"full{i}" / "checkpoint.pt.part"
        if i % 2 == 0:
            part.parent.mkdir()
            part.symlink_to("/dev/full")
        job = Job(script, folder, f"full{i}")
        if i % 2:
            job.until(job.checkpoint.exists, True)
            part.unlink(missing_ok=True)
            part.symlink_to("/dev/full")
        code, text = job.wait()
        if code == 0:  # the link came while a checkpoint was being written
            continue
        tried += 1
        lost += [] if one_line(code, text, "No space left on device") else [text[-300:]]
        lost += lost_after(script, folder, f"full{i}")
    return tried, lost


def one_line(code, text, words):
    """Whether a run failed with exit code 1 or 2, no traceback, and words in its last line."""
    return code in (1, 2) and "Traceback" not in text and words in text.rstrip().rsplit("\n", 1)[-1]


def flipped(content):
    """Flip one bit in the middle of a tensor, so the archive's checksum is wrong."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(random.Random(1).randbytes(5000)),
    "one bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "code in a pickle": lambda path: torch.save({"model": argparse.Namespace()}, path),
    "another version": lambda path: torch.save(torch.load(path) | {"format": 1}, path),
}


def bad_checkpoints(script, folder, times, rng):
    """Try checkpoints that are damaged, of another version or from other flags. Returns how many
    kinds there are, and which were overwritten or not refused in one line."""
    lost = []
    for name, damage in DAMAGES.items():
        shutil.copytree(folder / "whole", folder / name)
        damage(path := folder / name / "checkpoint.pt")
        before = path.read_bytes()
        for flags in ([], ["--resume"]):
            code, text = Job(script, folder, name, *flags).wait()
            if not one_line(code, text, "cannot be read"):
                lost.append(f"{name}: {text[-200:]}")
        lost += [f"{name} was overwritten"] * (path.read_bytes() != before)
    code, text = run(script, folder, "whole", "--lr", "0.5")
    if not one_line(code, text, "was trained with lr = "):
        lost.append(f"another config: {text[-200:]}")
    return len(DAMAGES) + 1, lost


def unwritable(script, folder, times, rng):
    """Write to a folder that cannot be created."""
    code, text = run(script, folder, "/dev/null/run")
    return 1, [] if one_line(code, text, "cannot be written") else [text[-300:]]


def processes(script, folder, times, rng):
    """The largest difference between the curves of two processes and of one, without dropout."""
    run(script, folder, "one", "--dropout", 0)
    code, text = run(script, folder, "two", "--dropout", 0, processes=2)
    return max_difference(folder, "one", "two") if code == 0 else text[-300:]


def killed_workers(script, folder, times, rng):
    """kill -9 of one of two processes, then --resume with 2, 1 or 4 processes.

    Returns how often one was killed, what was lost, and the largest difference between curves.
    """
    lost, gaps, tried, started = [], [], 0, 0
    while tried < times:
        name, count = f"worker{started}", (2, 1, 4)[tried % 3]
        started += 1
        job = Job(script, folder, name, "--dropout", 0, processes=2)
        path = job.checkpoint
        job.until(path.exists, True)
        if job.until(lambda path=path: train.load_checkpoint(path)["step"] > 0, True):
            time.sleep(rng.uniform(0, 0.5))
            if len(workers := children(job.process.pid)) == 2:
                os.kill(rng.choice(workers), signal.SIGKILL)
        code, text = job.wait()
        if code == 0:  # it finished first
            continue
        tried += 1
        if "SIGKILL" not in text:
            lost.append(f"no clear message: {text[-300:]}")
        if count == 2:
            lost += lost_after(script, folder, name, "--dropout", 0, processes=2, whole="two")
            continue
        code, text = run(script, folder, name, "--dropout", 0, processes=count)
        lost += [text[-300:]] * (code != 0)
        gaps += [max_difference(folder, "one", name)] * (code == 0)
    return tried, lost, max(gaps, default=0.0)


def children(pid):
    """Process IDs of the children of pid, on Linux."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [int(number) for number in listed.split()]


def end_study(folder, name, end, rng):
    """Start compare and end it with one of ENDS while it trains. Returns whether it was still
    training, what was lost, and whether it left a process behind, 0 or 1."""
    job = Job("compare", folder, name, output=subprocess.PIPE)
    job.log.close()
    runs = partial((folder / name / "sharpness").glob, "*/checkpoint.pt")
    job.until(lambda: len(list(runs())) == len(COMPARED), True)
    time.sleep(rng.uniform(0.2, 0.5))
    if job.process.poll() is not None:
        job.process.communicate()
        return False, [], 0
    pid, sig, left = job.process.pid, getattr(signal, end, signal.SIGKILL), 0
    if end == "a worker":
        commands = {each: Path(f"/proc/{each}/cmdline").read_bytes() for each in children(pid)}
        pid = rng.choice([each for each, command in commands.items() if b"spawn_main" in command])
    os.kill(pid, sig)
    try:  # returns once all processes that can print have ended
        text = job.process.communicate(timeout=30)[0].decode()
    except subprocess.TimeoutExpired:
        left = 1
        os.killpg(job.process.pid, signal.SIGKILL)
        text = job.process.communicate()[0].decode()
    lost = []
    words = {"SIGKILL": "", "a worker": "error: a worker was killed"}.get(end, "interrupted")
    code = {"SIGKILL": -9, "a worker": 1}.get(end, 130)
    if job.process.returncode != code or words not in text or "Traceback" in text:
        lost.append(f"no hint on how to continue: {text[-300:]}")
    steps = [train.load_checkpoint(path)["step"] for path in runs()]
    if steps.count(0) > (end == "a worker"):  # the killed worker saved nothing
        lost.append(f"steps: saved {steps}")
    return True, lost, left


def ended_studies(folder, times, rng):
    """Try each of ENDS in turn, at random moments of training; then run the same command again.
    Returns how often, what was lost, and how often a process was left behind."""
    lost, tried, started, left = [], 0, 0, 0
    run("compare", folder, "whole")
    while tried < times:
        name, end = f"study{started}", ENDS[tried % len(ENDS)]
        started += 1
        training, unsaved, leaves = end_study(folder, name, end, rng)
        if not training:  # it finished first
            continue
        tried, lost, left = tried + 1, lost + unsaved, left + leaves
        code, text = run("compare", folder, name)
        same = code == 0 and rows_of(folder, name) == rows_of(folder, "whole")
        lost += [] if same else [f"rows: {text[-300:]}"]
    return tried, lost, left


def rows_of(folder, name):
    """The rows of a finished study, without times."""
    rows = runcard.read_json(folder / name / "sharpness.json")["results"]["runs"]
    return [{key: x for key, x in row.items() if key != "seconds"} for row in rows]


ROWS = {  # each fault on the results page, and how it was tried
    "kill -9": ("`kill -9`", "at random moments of {phases}; then `--resume`"),
    "stop": ("Ctrl-C or SIGTERM", "at random moments; then `--resume`"),
    "closed terminal": ("a closed terminal (SIGHUP)", "at random moments; then `--resume`"),
    "broken pipe": (
        "a closed output pipe (`head -1`)",
        "the run stops at its next line; then `--resume`",
    ),
    "full disk": (
        "a full disk",
        "the first or a later checkpoint goes to `/dev/full`; then `--resume`",
    ),
    "bad checkpoint": ("a bad checkpoint", "{damages}, other flags: refused in one line"),
    "unwritable folder": ("a folder that cannot be created", "refused in one line before training"),
    "two processes": ("two processes instead of one", "same batches: curves at most {far} apart"),
    "killed worker": (
        "one of two processes killed",
        "then `--resume` with 2, 1 or 4: the same bits with 2, else curves at most {far} apart",
    ),
    "ended study": (
        "`compare` ended",
        "with `kill -9` of it or of a worker, Ctrl-C, SIGTERM or SIGHUP: {left} of these left a"
        " process behind; then the same command again",
    ),
}


def table(results):
    """The rows of the results page's table: fault, how it was tried, how often, what was lost."""
    rows = []
    for name, (fault, how) in ROWS.items():
        parts = [
            script_results[name] for script_results in results.values() if name in script_results
        ]
        phases = {p: sum(part.get("phases", {}).get(p, 0) for part in parts) for p in PHASES}
        description = how.format(
            phases=", ".join(f"{phase} ({count})" for phase, count in phases.items()),
            damages=", ".join(DAMAGES),
            far=f"{max(part.get('difference', 0) for part in parts):.0e}",
            left=sum(part.get("left", 0) for part in parts) or "none",
        )
        lost = [each for part in parts for each in part["lost"]]
        times = sum(part["times"] for part in parts)
        rows.append(f"| {fault} | {description} | {times} | {len(lost) or 'nothing'} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--times", type=int, default=24, help="tries per script and fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=runcard.RESULTS)
    settings = parser.parse_args()
    try:
        runcard.check_writable(settings.out / "faults.json")
    except UsageError as error:
        parser.error(str(error))
    start, rng, results = time.perf_counter(), random.Random(settings.seed), {}
    few = max(2, settings.times // 4)
    for script in (*SCRIPTS, "compare"):
        with tempfile.TemporaryDirectory() as folder:
            prepare(folder := Path(folder))
            script_results = results[script] = {}

            def record(name, count, lost, script_results=script_results, script=script, **details):
                script_results[name] = {"times": count, "lost": lost} | details
                print(f"{script}, {name}: {count} times, lost: {lost or 'nothing'} {details or ''}")

            if script == "compare":
                count, lost, left = ended_studies(folder, max(few, len(ENDS)), rng)
                record("ended study", count, lost, left=left)
                continue
            run(script, folder, "whole")
            hit, lost = kills(script, folder, settings.times, rng)
            record("kill -9", sum(hit.values()), lost, phases=hit)
            record("stop", *stops(script, folder, few, rng))
            record("closed terminal", *stops(script, folder, few, rng, ["SIGHUP"]))
            record("broken pipe", *broken_pipes(script, folder, few, rng))
            record("full disk", *full_disk(script, folder, few, rng))
            record("bad checkpoint", *bad_checkpoints(script, folder, few, rng))
            record("unwritable folder", *unwritable(script, folder, few, rng))
            gap = processes(script, folder, few, rng)
            record("two processes", 1, [] if isinstance(gap, float) else [gap], difference=gap)
            count, lost, gap = killed_workers(script, folder, few, rng)
            record("killed worker", count, lost, difference=gap)
    print(table(results))
    config = {"times": settings.times, "seed": settings.seed, "flags": FLAGS}
    data_info = {"name": "Python manual, and images of noise"}
    seconds = time.perf_counter() - start
    card = runcard.run_card(config, data_info, torch.device("cpu"), seconds, results)
    card["command"] = card["command"].replace("faults.py", "tests/tools/faults.py")
    runcard.write_json(settings.out / "faults.json", card)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4], sys.argv[4:])
    else:
        main()
