"""The studies of nala_min/lab: correct answers, evaluation on held-out data, variants that match
their names, published statistics, and no run done twice."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import run_here
from torch.testing import assert_close

from nala_min import ATTENTIONS, data, model, runcard, train
from nala_min.lab import compare, studies
from nala_min.lab.studies import STUDIES, PairEmbedding, Study, build_model

RECALL, SHARPNESS, TEXT, PICTURES = (
    STUDIES[name].task for name in ("recall", "sharpness", "text", "images")
)
OWN = "query_features = key_features = lambda x: x.abs()\n"
SMALL = Study(replace(SHARPNESS, steps=12), 6, 2, ("nala", "elu"), (("elu", "nala"),))

# --- Tasks ----------------------------------------------------------------------------------------


def test_recall_queries_every_key_once_and_expects_its_value():
    tokens, answers = RECALL.examples(8, 5, seed=1, step=3)
    keys, values = tokens // 65, tokens % 65
    for key, value, expected in zip(keys.tolist(), values.tolist(), answers.tolist(), strict=True):
        assert sorted(key[:8]) == sorted(key[8:]) and len(set(key)) == 8
        assert value[8:] == [64] * 8  # hidden
        assert [value[key.index(k)] for k in key[8:]] == expected
    embed = PairEmbedding(64, 8)
    first = embed.weight[keys[0, 0]] + embed.weight[64 + values[0, 0]]
    assert_close(embed(tokens)[0, 0], first)
    sizes = {RECALL.batch(1, step)[1].shape for step in range(60)}
    assert sizes == {(256, 4), (128, 8), (64, 16), (32, 32), (16, 64)}


def test_recall_counts_correct_answers():
    """Of an oracle that looks up every queried key but the first."""

    def look_up(tokens):
        keys, values, pairs = tokens // 65, tokens % 65, tokens.shape[1] // 2
        indices = (keys[:, :, None] == keys[:, None, :pairs]).float().argmax(-1)
        values = values.gather(1, indices)
        values[:, pairs] = (values[:, pairs] + 1) % 64
        return F.one_hot(values, 64).float(), None

    (oracle := torch.nn.Linear(1, 1)).forward = look_up
    right = {f"accuracy at {n} pairs": 1 - 1 / n for n in (4, 8, 16, 32, 64)}
    assert RECALL.evaluate(oracle) == pytest.approx(right)
    tokens, values = RECALL.examples(4, 6, seed=1, step=0)
    expected = F.cross_entropy(oracle(tokens)[0][:, 4:].transpose(1, 2), values)
    assert_close(RECALL.loss(oracle, tokens, values), expected)


@pytest.mark.parametrize("of", [4, 16])
def test_sharpness_expects_one_value_or_the_mean_of_many(of):
    inputs, targets = replace(SHARPNESS, of=of).examples(3, seed=1, step=0)
    queries, codes, values = inputs.split([20, 20, 8], dim=-1)
    expected, unit = targets.split([8, 1], dim=-1)
    assert_close(codes.square().sum(-1), torch.ones(3, 16))
    for b, t in np.ndindex(3, 16):
        group = codes[b, :, :4] @ codes[b, t, :4] > 0
        chosen = torch.ones(16, dtype=torch.bool) if of == 16 else group
        assert chosen.sum() == of and codes[b, t, 4:].count_nonzero() == 1
        if unit[b, t] == 1:
            assert_close(queries[b, t], 4 * codes[b, t])
            assert_close(expected[b, t], values[b, t])
        else:
            assert unit[b, t] == of**-0.5
            assert_close(queries[b, t], codes[b, t] / 4)
            assert_close(expected[b, t] * unit[b, t], values[b, chosen].mean(dim=0))


def test_sharpness_divides_errors_by_those_of_answering_zero():
    net = build_model(SHARPNESS, "nala", 1)
    found = SHARPNESS.evaluate(net)
    assert found["norm of one"] == pytest.approx(16 * found["norm of many"], rel=0.05)
    net.forward = lambda q, k, v: torch.where(q.norm(dim=-1, keepdim=True) > 1, v, 0)
    found = SHARPNESS.evaluate(net)
    assert found["error of one"] == 0 and found["error of many"] == pytest.approx(1, abs=0.05)
    assert found["error"] == found["error of many"] / 2
    assert SHARPNESS.loss(net, *SHARPNESS.batch(1, 0)).item() == pytest.approx(0.5, abs=0.1)


@pytest.fixture
def text(tmp_path):
    """The text task on a file whose last tenth has characters of its own."""
    (tmp_path / "text.txt").write_text(450 * "ab" + 50 * "cd", encoding="utf-8")
    return replace(TEXT, block=8, file=tmp_path / "text.txt")


@pytest.fixture
def pictures(monkeypatch):
    """The image task on dark images with one light edge, tested on light images."""
    dark, light = torch.zeros(40, 3, 32, 32).byte(), torch.full((5, 3, 32, 32), 184).byte()
    dark[..., 0], labels = 184, torch.arange(5)
    images = data.Images("Edges", (), (dark, labels.repeat(8)), (light, labels), mirror=True)
    monkeypatch.setattr(data, "load_images", lambda folder: images)
    monkeypatch.setattr(studies, "_images", studies._images.__wrapped__)
    return PICTURES


def evaluated(task, net):
    """The results of net, and what it reads for them."""
    seen = []
    with net.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])):
        return task.evaluate(net), torch.cat(seen)


def test_text_is_trained_on_its_first_nine_tenths_and_evaluated_on_the_last(text):
    net = build_model(text, "elu, same state", 1)
    found, read = evaluated(text, net)
    assert read.unique().tolist() == [2, 3] and read.numel() == 96
    loss = F.cross_entropy(net(read)[0].transpose(1, 2), 5 - read)  # c and d alternate
    assert found == pytest.approx({"validation loss": loss.item()})
    inputs, targets = text.batch(1, 0)
    assert inputs.shape == (8, 8) and torch.equal(targets, 1 - inputs)
    expected = F.cross_entropy(net(inputs)[0].transpose(1, 2), targets)
    assert_close(text.loss(net, inputs, targets), expected)


def test_images_are_trained_on_training_images_and_evaluated_on_test_images(pictures):
    net = build_model(pictures, "nala", 1)
    found, read = evaluated(pictures, net)
    assert read.unique().tolist() == [1.0]  # (184 - 120) / 64
    loss = F.cross_entropy(net(torch.ones(5, 3, 32, 32)), torch.arange(5)).item()
    assert found == pytest.approx({"test loss": loss, "test accuracy": 0.2})
    inputs, labels = pictures.batch(1, 0)
    assert inputs.shape == (32, 3, 32, 32) and inputs.unique().tolist() == [-1.875, 1.0]
    edges = {tuple((x[0, 0] > 0).nonzero()[:, 0].tolist()) for x in inputs}
    assert edges == {(0,), (31,)}  # mirrored, not shifted
    smooth = F.cross_entropy(net(inputs), labels, label_smoothing=0.1)
    assert_close(pictures.loss(net, inputs, labels), smooth)


@pytest.mark.parametrize("task", [RECALL, SHARPNESS], ids=["recall", "sharpness"])
def test_generated_tasks_are_evaluated_with_a_seed_that_no_run_has(task, monkeypatch):
    drawn, examples = [], type(task).examples
    monkeypatch.setattr(type(task), "examples", lambda *x: drawn.append(x[-2]) or examples(*x))
    task.evaluate(build_model(task, "nala", 1))
    assert set(drawn) == {1_000_000}


def test_weights_and_batches_depend_on_the_seed_and_not_on_the_attention(text, pictures):
    for task in (RECALL, SHARPNESS, text, pictures):
        one, same, other = (
            [*build_model(task, name, seed).parameters(), task.batch(seed, 4)[0]]
            for name, seed in (("relu", 1), ("elu", 1), ("elu", 2))
        )
        assert all(map(torch.equal, one, same))
        assert not torch.equal(one[0], other[0]) and not torch.equal(one[-1], other[-1])
        assert not torch.equal(one[-1], task.batch(1, 5)[0])


# --- Variants -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "query", "key"),
    [("lam 1", {"lam": 1.0}, {"lam": 1.0}), ("lam 2", {"lam": 2.0}, {"lam": 2.0}),
     ("lam 4", {"lam": 4.0}, {"lam": 4.0}), ("lam 1 of queries", {"lam": 1.0}, {}),
     ("lam 1 of keys", {}, {"lam": 1.0}), ("tau 0", {"tau": 0.0}, {}), ("tau 1", {"tau": 1.0}, {}),
     ("alpha 2", {"alpha": 2.0}, {"alpha": 2.0})],
)  # fmt: skip
def test_a_variant_attends_as_its_name_says(name, query, key):
    q, k, v = torch.randn(3, 1, 2, 9, 16)
    phi_q, phi_k = partial(model.query_features, **query), partial(model.key_features, **key)
    expected = model.linear_attention(q, k, v, phi_q, phi_k, causal=True)
    attend = build_model(RECALL, name, 1).blocks[0].attention.attend
    assert_close(attend(q, k, v, causal=True), expected)


def test_without_the_query_norm_the_power_is_4_5():
    q, k, v = torch.randn(3, 1, 2, 9, 16)
    direction = F.normalize(q, dim=-1)
    phi_q = model.cosine_map(direction.abs() ** 4.5, direction)
    expected = model.linear_attention(q, k, v, lambda _: phi_q, model.key_features)
    assert_close(ATTENTIONS["no query norm"](q, k, v), expected)


def test_no_convolution_stays_zero_in_training(tmp_path):
    name = "elu, no convolution"
    bare, plain = (build_model(RECALL, x, 1).blocks[0].attention for x in (name, "elu"))
    assert bare.attend is plain.attend and torch.equal(bare.project.weight, plain.project.weight)
    compare.run(replace(RECALL, steps=2, tokens=64), name, 1, tmp_path)
    weights = torch.load(tmp_path / "checkpoint.pt")["model"]
    assert not any(x.any() for name, x in weights.items() if ".local." in name)
    assert build_model(RECALL, "no convolution", 1).config.attention == "nala"
    assert build_model(RECALL, "elu, same state", 1).config.num_heads == 1  # instead of 2


# --- Numbers --------------------------------------------------------------------------------------


def rows(result, **results):
    """Rows of runs, the last seed first."""
    pairs = [(name, seed) for name in results for seed in range(len(results[name]), 0, -1)]
    return [{"variant": x, "seed": seed, result: results[x][seed - 1]} for x, seed in pairs]


def test_the_difference_is_paired_and_its_interval_is_student_s():
    found = compare.difference([1.0, 2.0, 4.0], [0.5, 1.6, 3.9])  # 0.5, 0.4 and 0.1
    assert found == pytest.approx((1 / 3, 4.303 * 0.2081666 / math.sqrt(3)))
    assert compare.difference([1.0], [2.0]) == (-1.0, math.inf)
    for pairs in range(2, 21):  # at the end of the interval, p is 0.05
        values = [*range(pairs)]
        t = compare.difference(values, pairs * [0])[1] / np.std(values, ddof=1) * math.sqrt(pairs)
        assert compare.p_value(t, pairs) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize(
    ("t", "pairs", "p"),  # from a textbook's table of Student's t
    [(1.0, 2, 0.5), (6.314, 2, 0.1), (2.920, 3, 0.1), (4.604, 5, 0.01), (2.365, 8, 0.05),
     (5.408, 8, 0.001), (2.861, 20, 0.01), (0.0, 5, 1.0)],
)  # fmt: skip
def test_a_p_value_is_the_textbook_s(t, pairs, p):
    assert compare.p_value(t, pairs) == pytest.approx(p, rel=2e-3)
    assert compare.p_value(-t, pairs) == compare.p_value(t, pairs)


def test_holm_corrects_for_the_number_of_tests():
    """By hand: the smallest times 4, the next times 3, and so on; increasing, and at most 1."""
    assert compare.holm([0.04, 0.01, 0.5, 0.015]) == pytest.approx([0.08, 0.04, 0.5, 0.045])
    assert compare.holm([0.03, 0.02, 0.025]) == pytest.approx([0.06, 0.06, 0.06])
    assert compare.holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_study_s_answers_are_corrected_for_their_number():
    """elu minus nala is 1.0, 1.1 and 0.9: t is 10 sqrt(3), so p is 0.0033; it is tripled."""
    study = replace(SMALL, questions=(("elu", "nala"), ("split", "elu"), ("relu", "nala")))
    ours, elu = [1.0, 2.0, 3.0], [2.0, 3.1, 3.9]
    results = rows("error", nala=ours, elu=elu, split=[2.1, 2.9, 4.3], relu=ours)
    first, second, third = compare.answers(results, study)
    assert first[:2] == ("elu", "nala") and first.p == pytest.approx(0.00995, rel=2e-3)
    assert first[2:4] == pytest.approx((1, 4.303 * 0.1 / math.sqrt(3)))
    assert second.difference == pytest.approx(0.1) and second.p > 0.9
    assert (third.difference, third.p) == (0.0, 1.0)
    assert compare.answers(rows("error", nala=[1.0], elu=[2.0]), SMALL)[0].p == 1.0  # one seed


# --- Runs -----------------------------------------------------------------------------------------


def test_a_run_follows_its_task_and_its_seed_and_continues_its_checkpoint(tmp_path, monkeypatch):
    calls, history = [], [{"step": 0, "error": 9.0}, {"step": 12, "error": 0.5}]
    monkeypatch.setattr(train, "fit", lambda *x, **y: calls.append((*x, y)) or (history, 1.26))
    row = {"variant": "nala", "seed": 3, "parameters": 640, "seconds": 1.3, "error": 0.5}
    assert compare.run(SMALL.task, "nala", 3, tmp_path) == row
    (tmp_path / "checkpoint.pt").touch()
    compare.run(SMALL.task, "nala", 3, tmp_path)
    (net, recipe, options), (*_, again) = calls
    assert torch.equal(net.query.weight, build_model(SHARPNESS, "nala", 3).query.weight)
    assert recipe == train.Recipe(12, 0.01, schedule="cosine", eval_every=12, seed=3)
    assert torch.equal(options["batch"](7)[0], SHARPNESS.batch(3, 7)[0])
    assert (options["resume"], again["resume"], options["extra"]["seed"]) == (False, True, 3)


@pytest.fixture
def trained(monkeypatch):
    """A list of the runs done, in this process instead of workers. They train nothing."""
    done = []

    def run(task, name, seed, folder, device):
        done.append((name, seed))
        found = dict.fromkeys((task.result, "error of one", "error of many"), 1.0)
        return {"variant": name, "seed": seed, "seconds": 60.0} | found

    def process(target, args):
        return SimpleNamespace(start=partial(target, *args), join=lambda: None, exitcode=0)

    context, idle = SimpleNamespace(Process=process), SimpleNamespace(start=lambda: None)
    processes = SimpleNamespace(get_context=lambda kind: context)
    threads = SimpleNamespace(Thread=lambda **_: idle, RLock=threading.RLock)
    for name, value in {"run": run, "multiprocessing": processes, "threading": threads}.items():
        monkeypatch.setattr(compare, name, value)
    with mock.patch.dict(ATTENTIONS):
        yield done


def test_a_study_writes_its_card_and_repeats_no_finished_run(tmp_path, monkeypatch, trained):
    monkeypatch.setattr(compare, "STUDIES", dict.fromkeys(("text", "recall", "sharpness"), SMALL))
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    flags = ["--attention", "mine.py", "--workers", "4"]
    result = run_here(compare, tmp_path, *flags)
    assert (result.returncode, result.stderr) == (0, "")
    keys = [(name, seed) for name in ("nala", "elu", "mine.py") for seed in (1, 2)]
    assert sorted(trained) == sorted(3 * keys)
    cards = [tmp_path / "runs" / "compare" / f"{x}.json" for x in ("recall", "sharpness", "text")]
    card, sharpness, _ = map(runcard.read_json, cards)
    assert card["command"] == "python -m nala_min.lab.compare --attention mine.py --workers 4"
    assert [(row["variant"], row["seed"]) for row in card["results"]["runs"]] == keys
    assert card["data"] == {"name": "generated"} and card["hardware"]["threads"] == 1
    assert card["seconds"] == 360 and cards[2].with_suffix(".png").exists()
    config = sharpness["config"]
    assert len(config.pop("attention_sha256")["mine.py"]) == 64
    assert config == {
        "study": "sharpness", "seeds": 2, "variants": ["nala", "elu", "mine.py"],
        "task": {"steps": 12, "learning_rate": 0.01, "muon": None, "weight_decay": 0.1,
                 "schedule": "cosine", "of": 4},
    }  # fmt: skip
    assert compare.table(card["results"]["runs"], "error") in result.stdout
    assert "elu - nala: +0.0000 ± 0.0000, p = 1.000" in result.stdout
    assert run_here(compare, tmp_path, *flags).returncode == 0 and len(trained) == 18
    assert runcard.read_json(cards[0])["results"] == card["results"]


def test_a_run_is_repeated_only_if_task_data_or_code_have_changed(tmp_path, monkeypatch, trained):
    text, edited = 80 * "to be, or not to be: ", tmp_path / "edited.py"
    files = {"t.txt": text, "same.txt": text, "other.txt": text + "!", "mine.py": OWN}
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")

    def repeats(name="nala", file="t.txt", **changes):
        task, before = replace(TEXT, block=16, file=tmp_path / file, **changes), len(trained)
        compare.run_all(Study(task, 1, 1, (name,)), tmp_path / "runs", 1, "cpu")
        return len(trained) > before

    monkeypatch.chdir(tmp_path)
    assert repeats() and repeats(file="other.txt") and repeats(windows=2) and repeats("elu")
    assert repeats("mine.py") and not repeats("mine.py")
    assert not repeats(str(tmp_path / "mine.py")) and not repeats(file="same.txt")
    (tmp_path / "mine.py").write_text(OWN + "\n", encoding="utf-8")
    assert repeats("mine.py")
    for module in (studies, compare):  # for the others, see test_runcard.py
        edited.write_bytes(Path(module.__file__).read_bytes() + b"edited = True\n")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(edited))
            assert repeats(), module
    assert not repeats()


SMALL_STUDY = """from dataclasses import replace
from nala_min.flags import run_script
from nala_min.lab import compare
study = compare.STUDIES["sharpness"]
small = replace(study, task=replace(study.task, steps=1000), variants=("nala", "elu"), seeds=1)
compare.STUDIES = {"sharpness": small}
run_script(compare.main)"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("killed", ["SIGINT", "SIGKILL", "worker"])
def test_an_ended_study_saves_its_runs_and_leaves_no_process(killed, tmp_path):
    """communicate returns once all processes that can print have ended."""
    flags = ["--study", "sharpness", "--workers", "2", "--out", tmp_path]
    process = subprocess.Popen(
        [sys.executable, "-c", SMALL_STUDY, *flags], cwd=runcard.RESULTS.parents[1],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    while len(saved := [*tmp_path.glob("*/*/checkpoint.pt")]) < 2 and process.poll() is None:
        time.sleep(0.01)
    time.sleep(1)
    pid = process.pid
    if killed == "worker":
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        is_worker = [b"spawn_main" in Path(f"/proc/{x}/cmdline").read_bytes() for x in children]
        pid = int(children[is_worker.index(True)])
    os.kill(pid, getattr(signal, killed, signal.SIGKILL))
    printed = process.communicate(timeout=300)[0].decode()
    expected = {"SIGINT": (130, "interrupted"), "SIGKILL": (-9, "")}
    code, words = expected.get(killed, (1, "error: a worker was killed"))
    assert process.returncode == code and words in printed and "Traceback" not in printed, printed
    steps = [train.load_checkpoint(path)["step"] for path in saved]
    assert steps.count(0) <= (killed == "worker"), printed  # a killed worker saves nothing


def test_flags_change_a_study():
    study, settings = compare.configured_study, compare.Settings
    quick = study(settings(quick=True), "recall")
    assert (quick.seeds, quick.task.steps, study(settings(seeds=20), "recall").seeds) == (1, 60, 20)
    assert study(settings(data=Path("a.txt")), "text").task.file == Path("a.txt")
    assert study(settings(data_dir=Path("b")), "images").task.folder == Path("b")
