"""studies.py and compare.py: correct answers, variants that match their names, no repeated runs."""

import math
import os
import random
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import train_cifar
import train_shakespeare
from nala_min import ATTENTIONS, Config, data, model, plots, runcard
from nala_min.flags import UsageError, run_script
from nala_min.lab import compare, studies
from nala_min.lab.studies import STUDIES, PairEmbedding, Sharpness, Study, build_model

RECALL, SHARPNESS = STUDIES["recall"].task, STUDIES["sharpness"].task


def layer_of(name, seed=1):
    return build_model(RECALL, name, seed).blocks[0].attention


# --- Tasks ----------------------------------------------------------------------------------------


def test_recall_queries_every_key_once_and_expects_its_value():
    tokens, answers = RECALL.examples(8, 5, seed=1, step=3)
    assert tokens.shape == (5, 16) and answers.shape == (5, 8)
    keys, values = tokens // 65, tokens % 65
    for key, value, expected in zip(keys.tolist(), values.tolist(), answers.tolist(), strict=True):
        assert sorted(key[:8]) == sorted(key[8:]) and len(set(key)) == 8
        assert value[8:] == [64] * 8  # hidden
        assert [value[key.index(k)] for k in key[8:]] == expected


def test_a_pair_is_embedded_as_the_sum_of_its_key_and_its_value():
    embed = PairEmbedding(64, 8)
    token = torch.tensor([[3 * 65 + 5, 7 * 65 + 64]])
    assert_close(embed(token)[0, 0], embed.weight[3] + embed.weight[64 + 5])
    assert_close(embed(token)[0, 1], embed.weight[7] + embed.weight[128])


def test_recall_batches_depend_on_seed_and_step_and_have_about_equally_many_tokens():
    batches = [RECALL.batch(seed, step) for seed, step in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert torch.equal(batches[0][0], batches[1][0]) and torch.equal(batches[0][1], batches[1][1])
    assert all(not torch.equal(batches[0][0], other) for other, _ in batches[2:])
    assert {RECALL.batch(1, step)[1].shape[1] for step in range(60)} == set(RECALL.pairs)
    assert all(2048 - 128 <= RECALL.batch(1, step)[0].numel() <= 2048 for step in range(9))


def test_recall_counts_correct_answers():
    class Oracle(torch.nn.Linear):
        """Looks up every queried key but the first."""

        def forward(self, tokens):
            pairs = tokens.shape[1] // 2
            keys, values = tokens // 65, tokens % 65
            indices = (keys[:, :, None] == keys[:, None, :pairs]).float().argmax(-1)
            values = values.gather(1, indices)
            values[:, pairs] = (values[:, pairs] + 1) % 64
            return F.one_hot(values, 64).float(), None

    shares = RECALL.evaluate(Oracle(1, 1))
    assert list(shares) == [f"accuracy at {pairs} pairs" for pairs in RECALL.pairs]
    assert list(shares.values()) == pytest.approx([1 - 1 / pairs for pairs in RECALL.pairs])
    assert RECALL.result == list(shares)[-1]
    tokens, values = RECALL.examples(4, 6, seed=1, step=0)
    expected = F.cross_entropy(Oracle(1, 1)(tokens)[0][:, 4:].transpose(1, 2), values)
    assert_close(RECALL.loss(Oracle(1, 1), tokens, values), expected)


@pytest.mark.parametrize("of", [4, 16])
def test_sharpness_expects_one_value_or_the_mean_of_many(of):
    inputs, targets = replace(SHARPNESS, of=of).examples(3, seed=1, step=0)
    queries, codes, values = inputs.split([20, 20, 8], dim=-1)
    expected, unit = targets.split([8, 1], dim=-1)
    assert {round(u, 4) for u in unit.unique().tolist()} == {1.0, round(of**-0.5, 4)}
    for b in range(3):
        for t in range(16):
            group = codes[b, :, :4] @ codes[b, t, :4] > 0
            chosen = torch.ones(16, dtype=torch.bool) if of == 16 else group
            assert chosen.sum() == of
            if unit[b, t] == 1:
                assert_close(queries[b, t], 4 * codes[b, t])
                assert_close(expected[b, t], values[b, t])
            else:
                assert_close(queries[b, t], codes[b, t] / 4)
                assert_close(expected[b, t] * unit[b, t], values[b, chosen].mean(dim=0))


def test_a_zero_answer_has_an_error_of_one():
    inputs, targets = SHARPNESS.examples(400, seed=1, step=0)
    errors = SHARPNESS.errors(lambda *_: torch.zeros(()), inputs, targets)
    assert errors.shape == (400, 16)
    for kind in (targets[..., -1] == 1, targets[..., -1] < 1):
        assert errors[kind].mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("name", "blind"), [("relu", True), ("no query norm", True), ("nala", False), ("elu", False)]
)
def test_attentions_blind_to_the_norm_answer_both_queries_alike(name, blind):
    net = build_model(SHARPNESS, name, 1).double()
    inputs, _ = SHARPNESS.examples(2, seed=1, step=0)
    queries, codes, values = inputs.double().split([20, 20, 8], dim=-1)
    short, long = net(queries / 2, codes, values), net(queries * 2, codes, values)
    assert torch.allclose(short, long, rtol=0, atol=1e-9) == blind


def test_sharpness_reports_both_errors_and_both_norms():
    results = SHARPNESS.evaluate(build_model(SHARPNESS, "nala", 1))
    one, many = results["error of one"], results["error of many"]
    assert results["error"] == pytest.approx((one + many) / 2) and one != many
    assert results["norm of one"] == pytest.approx(16 * results["norm of many"], rel=0.05)


# --- Variants -------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", ["recall", "sharpness"])
def test_parameters_are_nearly_equal(study):
    def parameters(name):
        return sum(p.numel() for p in build_model(STUDIES[study].task, name, 1).parameters())

    for name in STUDIES[study].variants:
        wide = study == "sharpness" and name.endswith(", same state")  # D = 32 instead of 16
        assert parameters(name) == pytest.approx((1 + wide) * parameters("nala"), rel=0.01), name


@pytest.mark.parametrize(
    ("name", "heads", "features"), [("nala", 2, 32), ("elu, same state", 1, 32)]
)
def test_half_the_heads_make_a_state_as_large_as_nala_s(name, heads, features):
    _, states = build_model(RECALL, name, 1)(torch.zeros(1, 3, dtype=torch.long))
    assert states[0][0].shape == (1, heads, features, 32 // heads + 1)


def phi_q(power=None, **options):
    """query_features, or with a constant power."""
    if power is None:
        return partial(model.query_features, **options)

    def features(q):
        _, direction = model.decompose(q)
        return model.cosine_map(model.query_magnitude(direction, torch.tensor(power)), direction)

    return features


@pytest.mark.parametrize(
    ("name", "query", "key"),
    [
        ("nala", {}, {}),
        ("lam 1", {"lam": 1.0}, {"lam": 1.0}),
        ("lam 1 of queries", {"lam": 1.0}, {}),
        ("lam 1 of keys", {}, {"lam": 1.0}),
        ("tau 0", {"tau": 0.0}, {}),
        ("alpha 2", {"alpha": 2.0}, {"alpha": 2.0}),
        ("split", {"feature_map": "split"}, {"feature_map": "split"}),
        ("no query norm", {"power": 4.5}, {}),
    ],
)
def test_a_variant_attends_as_its_name_says(name, query, key):
    q, k, v = torch.randn(3, 1, 2, 9, 16)
    maps = phi_q(**query), partial(model.key_features, **key)
    expected = model.linear_attention(q, k, v, *maps, causal=True)
    assert_close(layer_of(name).attend(q, k, v, causal=True), expected)


def test_softmax_with_one_norm_depends_only_on_a_query_s_direction():
    """The output is the same for queries shorter and longer than the head's norm."""
    attend = layer_of("softmax, one norm").attend
    q, k, v = torch.randn(3, 1, 2, 6, 16)
    assert attend.norm.tolist() == [4.0, 4.0]
    with torch.no_grad():
        attend.norm.copy_(torch.tensor([0.5, 2.0]))
    expected = ATTENTIONS["softmax"](attend.norm[:, None, None] * F.normalize(q, dim=-1), k, v)
    for size in (0.01, 1.0, 100.0):
        assert_close(attend(size * q, k, v, causal=False), expected)


@pytest.mark.parametrize("name", ["no convolution", "elu, no convolution"])
def test_no_convolution_stays_zero_in_training(name, tmp_path):
    """Everything else is initialised as with it."""
    plain = layer_of("nala" if name == "no convolution" else "elu")
    bare = layer_of(name)
    assert bare.attend is plain.attend and torch.equal(bare.project.weight, plain.project.weight)
    row = compare.run(replace(RECALL, steps=2, tokens=64), name, 1, tmp_path)
    weights = torch.load(tmp_path / "checkpoint.pt")["model"]
    for part in ("weight", "bias"):
        assert not weights[f"blocks.0.attention.local.conv.{part}"].any()
    trained = sum(p.numel() for p in build_model(RECALL, "nala", 1).parameters())
    assert row["parameters"] == trained - sum(p.numel() for p in plain.local.parameters())


def test_a_misspelt_variant_is_an_error():
    for name in ("nala, same stat", "nela"):
        with pytest.raises(KeyError):
            build_model(SHARPNESS, name, 1)


def test_every_study_s_questions_are_about_its_variants_and_it_can_be_drawn():
    for study in STUDIES.values():
        assert study.seeds >= 5 and len(set(study.variants)) == len(study.variants)
        assert {name for pair in study.questions for name in pair} <= set(study.variants)
        results = dict.fromkeys((study.task.result, "error of one", "error of many"), 0.5)
        results |= {f"accuracy at {pairs} pairs": 0.5 for pairs in RECALL.pairs}
        rows = [{"variant": name, "seed": 1} | results for name in study.variants]
        assert study.task.draw(rows).axes


@pytest.mark.parametrize(
    ("study", "script", "batch"),
    [("text", train_shakespeare, "windows"), ("images", train_cifar, "images")],
)
def test_the_recipe_is_the_script_s(study, script, batch):
    """Except for its length."""
    task, preset = STUDIES[study].task, script.PRESETS["cpu"]
    assert task.sizes == (preset["layers"], preset["heads"], preset["dim"])
    assert getattr(task, batch) == preset["batch"]
    recipe = task.learning_rate, task.muon, task.weight_decay
    assert recipe == tuple(preset[x] for x in ("lr", "muon", "weight_decay"))
    assert task.schedule == "linear" and preset["dropout"] == 0
    if study == "text":
        assert task.block == preset["block"]
    else:
        assert preset["shift"] == 0 and preset["patch"] == Config().patch_size


def test_text_and_images_are_trained_on_their_own_data(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("to be, or not to be: " * 40, encoding="utf-8")
    images = data.drawn_images(64, 10)
    monkeypatch.setattr(studies, "_images", lambda name, folder: images)
    small = {"steps": 2, "sizes": (1, 2, 8)}
    text = replace(STUDIES["text"].task, block=8, file=tmp_path / "text.txt", **small)
    row = compare.run(text, "elu, same state", 1, tmp_path / "text")
    inputs, targets = text.batch(1, 0)
    assert inputs.shape == (8, 8) and torch.equal(inputs[:, 1:], targets[:, :-1])
    assert 0 < row["validation loss"] < 4
    pictures = replace(STUDIES["images"].task, **small)
    row = compare.run(pictures, "softmax, one norm", 1, tmp_path / "images")
    inputs, _ = pictures.batch(1, 0)
    assert inputs.shape == (32, 3, 32, 32) and inputs.abs().max() < 3  # normalised
    assert 10 * row["test accuracy"] == pytest.approx(round(10 * row["test accuracy"]), abs=1e-5)
    assert pictures.data_info() == {"name": images.name, "sha256": images.sha256}


def test_a_picture_of_sharpness_has_a_panel_for_each_error():
    results = [
        {"variant": name, "seed": seed, "error of one": seed / 4, "error of many": seed / 8}
        for name in ("nala", "tau 0")
        for seed in (1, 2)
    ]
    left, right = SHARPNESS.draw(results).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["NaLa", "NaLa, τ = 0"]
    for axes, unit in ((left, 4), (right, 8)):
        dots = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
        assert [list(x) for x in dots] == [[1 / unit, 2 / unit]] * 2


def test_the_picture_of_recall_has_a_line_for_each_attention():
    shares = {f"accuracy at {pairs} pairs": 1 / pairs for pairs in RECALL.pairs}
    results = [{"variant": name} | shares for name in plots.VARIANT_STYLES for _ in range(2)]
    (axes,) = RECALL.draw(results).axes
    assert len(axes.lines) == len(plots.VARIANT_STYLES)
    assert list(axes.lines[0].get_ydata()) == pytest.approx([1 / pairs for pairs in RECALL.pairs])


# --- Numbers --------------------------------------------------------------------------------------


def rows(result="loss", **results):
    return [
        {"variant": name, "seed": seed, result: value}
        for name, values in results.items()
        for seed, value in enumerate(values, 1)
    ]


def test_the_difference_is_paired_and_its_interval_is_student_s():
    ours, theirs = [1.0, 2.0, 4.0], [0.5, 1.6, 3.9]
    pairs = np.subtract(ours, theirs)
    gap, half = compare.difference(ours, theirs)
    assert gap == pytest.approx(pairs.mean())
    assert half == pytest.approx(4.303 * pairs.std(ddof=1) / math.sqrt(3))
    assert compare.difference([1.0], [2.0]) == (-1.0, math.inf)


@pytest.mark.parametrize(
    ("t", "pairs", "p"),  # from a textbook's table of Student's t
    [(1.0, 2, 0.5), (6.314, 2, 0.1), (2.920, 3, 0.1), (4.604, 5, 0.01), (2.365, 8, 0.05),
     (5.408, 8, 0.001), (2.861, 20, 0.01), (0.0, 5, 1.0)],
)  # fmt: skip
def test_a_p_value_is_the_textbook_s(t, pairs, p):
    assert compare.p_value(t, pairs) == pytest.approx(p, rel=2e-3)
    assert compare.p_value(-t, pairs) == compare.p_value(t, pairs)


def test_a_p_value_is_0_05_at_the_end_of_every_interval():
    assert len(compare.T_QUANTILES) == 19
    for pairs, end in enumerate(compare.T_QUANTILES, 2):
        assert compare.p_value(end, pairs) == pytest.approx(0.05, abs=1e-4)


def test_holm_corrects_for_the_number_of_tests():
    """By hand: the smallest times 4, the next times 3, and so on; increasing, and at most 1."""
    assert compare.holm([0.04, 0.01, 0.5, 0.015]) == pytest.approx([0.08, 0.04, 0.5, 0.045])
    assert compare.holm([0.3, 0.6]) == [0.6, 0.6]
    assert compare.holm([0.03, 0.02, 0.025]) == pytest.approx([0.06, 0.06, 0.06])
    assert compare.holm([]) == []


def test_a_study_s_answers_are_corrected_for_their_number():
    """The smallest of three p-values is tripled. A difference of 0 has a p-value of 1."""
    questions = (("elu", "nala"), ("split", "elu"), ("relu", "nala"))
    study = Study(SHARPNESS, 1, 3, ("nala", "elu", "split", "relu"), questions)
    numbers = {"nala": [1.0, 2.0, 3.0], "elu": [2.0, 3.1, 3.9], "split": [2.1, 2.9, 4.3]}
    results = rows("error", **numbers, relu=numbers["nala"])
    first, second, third = compare.answers(results, study)
    assert (first.variant, first.baseline) == ("elu", "nala")
    found = compare.difference(numbers["elu"], numbers["nala"])
    assert (first.difference, first.half_width) == found
    t = 4.303 * first.difference / first.half_width
    assert first.p == pytest.approx(3 * compare.p_value(t, 3))
    assert second.difference == pytest.approx(0.1) and first.p < second.p
    assert (third.difference, third.p) == (0.0, 1.0)


def test_the_table_has_mean_bounds_and_difference():
    text = compare.table(rows(nala=[1.0, 2.0, 3.0], elu=[2.0, 3.5, 3.5]), "loss")
    heading, nala, elu = text.splitlines()
    assert heading.split()[:2] == ["loss", "mean"]
    assert nala.split() == ["nala", "2.0000", "1.0000", "3.0000"]
    assert elu.split() == ["elu", "3.0000", "2.0000", "3.5000", "+1.0000", "±", "1.2422"]


# --- Runs -----------------------------------------------------------------------------------------

SMALL = Study(replace(SHARPNESS, steps=12), 6, 2, ("nala", "elu", "polar"))


def without_time(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def test_a_run_is_a_function_of_its_seed_and_resumes_where_it_stopped(tmp_path, monkeypatch):
    whole, again, other = (
        without_time(compare.run(SMALL.task, "nala", seed, tmp_path / name))
        for name, seed in (("whole", 1), ("again", 1), ("other", 2))
    )
    assert whole == again and whole["error"] != other["error"]
    assert whole["variant"] == "nala" and whole["seed"] == 1 and whole["parameters"] == 640
    batch = Sharpness.batch

    def stopped(self, seed, step):
        if step == 7:
            raise KeyboardInterrupt
        return batch(self, seed, step)

    monkeypatch.setattr(Sharpness, "batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare.run(SMALL.task, "nala", 1, tmp_path / "stopped")
    monkeypatch.setattr(Sharpness, "batch", batch)
    assert without_time(compare.run(SMALL.task, "nala", 1, tmp_path / "stopped")) == whole


def test_initial_weights_depend_on_the_seed_and_not_on_the_attention():
    first, same, other = (
        build_model(SHARPNESS, name, seed).query.weight
        for name, seed in (("nala", 1), ("elu", 1), ("nala", 2))
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_study_writes_its_card_and_repeats_no_finished_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(compare.STUDIES, "sharpness", SMALL)
    argv = ["compare.py", "--study", "sharpness", "--workers", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", argv)
    run_script(compare.main)
    out, err = capfd.readouterr()
    card = runcard.read_json(tmp_path / "sharpness.json")
    assert card["command"].startswith("python -m nala_min.lab.compare --study sharpness")
    assert card["config"]["variants"] == list(SMALL.variants)
    assert card["config"]["task"]["steps"] == 12
    assert (tmp_path / "sharpness.png").read_bytes().startswith(b"\x89PNG")
    runs = card["results"]["runs"]
    keys = [(name, seed) for name in SMALL.variants for seed in (1, 2)]
    assert [(row["variant"], row["seed"]) for row in runs] == keys
    expected = compare.run(SMALL.task, "elu", 2, tmp_path / "here")
    assert without_time(runs[3]) == without_time(expected)
    assert compare.table(runs, "error") in out and "training" not in err

    monkeypatch.setattr(compare, "_work", None)  # it cannot be called
    run_script(compare.main)
    assert runcard.read_json(tmp_path / "sharpness.json")["results"] == card["results"]


def test_a_flag_sets_the_number_of_seeds_and_of_steps():
    chosen = partial(compare.configured_study, name="recall")
    assert chosen(compare.Settings()) == STUDIES["recall"]
    assert chosen(compare.Settings(seeds=8)).seeds == 8
    quick = chosen(compare.Settings(quick=True))
    assert (quick.seeds, quick.task.steps) == (1, STUDIES["recall"].quick)
    for count in (0, 21):
        with pytest.raises(UsageError, match=f"--seeds must be from 1 to 20, got {count}"):
            compare.Settings(seeds=count)


def test_a_run_is_known_by_the_content_of_its_files_and_not_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "to be, or not to be: " * 80
    own = "query_features = key_features = lambda x: x.abs()\n"
    for name in ("t.txt", "same.txt"):
        Path(name).write_text(text, encoding="utf-8")
    Path("other.txt").write_text(text + "!", encoding="utf-8")
    Path("mine.py").write_text(own, encoding="utf-8")
    task = replace(STUDIES["text"].task, block=16)

    def folder(file, name="nala", **changes):
        identity = compare._identity(replace(task, file=Path(file), **changes), name)
        return compare._run_folder(tmp_path, 1, identity)

    first = folder("t.txt")
    assert first == folder(tmp_path / "t.txt") == folder("same.txt")
    mine = folder("t.txt", "mine.py")
    assert mine == folder("t.txt", str(tmp_path / "mine.py"))
    Path("mine.py").write_text(own + "\n", encoding="utf-8")
    others = [folder("other.txt"), folder("t.txt", windows=2), folder("t.txt", "elu")]
    assert len({first, mine, folder("t.txt", "mine.py"), *others}) == 6
    ATTENTIONS.pop("mine.py"), ATTENTIONS.pop(str(tmp_path / "mine.py"))


@pytest.mark.parametrize("name", ["compare", "model", "fast", "train", "studies"])
def test_an_edit_of_the_training_code_makes_another_run(name, tmp_path, monkeypatch):
    before = compare._identity(SMALL.task, "nala")
    module = compare if name == "compare" else getattr(compare, name)
    edited = tmp_path / "edited.py"
    edited.write_bytes(Path(module.__file__).read_bytes() + b"# edited\n")
    monkeypatch.setattr(module, "__file__", str(edited))
    assert compare._identity(SMALL.task, "nala") != before


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("end", ["SIGKILL", "a worker", "SIGINT"])
def test_workers_save_their_runs_and_end_with_their_parent(end, tmp_path):
    """The same command then completes the study."""
    training, lost, left = faults.end_study(tmp_path, "study", end, random.Random(1))
    assert (training, lost, left) == (True, [], 0)
    if end == "SIGKILL":
        code, text = faults.run("compare", tmp_path, "study")
        assert code == 0, text
        assert len(faults.rows_of(tmp_path, "study")) == len(faults.COMPARED)


def test_a_run_that_diverges_is_one_line_and_ctrl_c_works_afterwards(tmp_path, capfd):
    handler = signal.getsignal(signal.SIGINT)
    study = replace(
        SMALL, task=replace(SMALL.task, learning_rate=1e30), variants=("nala",), seeds=1
    )
    with pytest.raises(ChildProcessError, match="run the same command to continue"):
        compare.run_all(study, tmp_path, 1, "cpu")
    assert capfd.readouterr().err.startswith("nala, seed 1: the loss is not finite")
    assert signal.getsignal(signal.SIGINT) == handler


# --- Checks before any work -----------------------------------------------------------------------


def error_of(monkeypatch, capsys, *flags):
    """compare's error message, printed before any training."""
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, flags)])
    monkeypatch.setattr(compare, "run_all", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit, match="2"):
        run_script(compare.main)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", ["recall.json", "text.png", "sharpness"])
def test_unwritable_output_of_the_last_study_is_an_error_before_the_first(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compare, "STUDIES", dict.fromkeys(("text", "recall", "sharpness"), SMALL))
    path = tmp_path / name
    path.mkdir() if path.suffix else path.touch()
    error = error_of(monkeypatch, capsys, "--out", tmp_path)
    assert "cannot be written" in error and path.name in error
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p != path] == []


def test_the_last_study_s_data_and_attention_file_are_checked_before_the_first(
    tmp_path, monkeypatch, capsys
):
    missing = tmp_path / "missing.txt"
    assert "missing.txt" in error_of(monkeypatch, capsys, "--data", missing, "--out", tmp_path)
    wrong = tmp_path / "wrong.py"
    wrong.write_text("1 / 0\n", encoding="utf-8")
    assert "wrong.py" in error_of(monkeypatch, capsys, "--attention", wrong, "--out", tmp_path)


def test_impossible_flags_are_one_line(monkeypatch, capsys):
    assert "--workers must be from 1 to 10000, got 0" in error_of(
        monkeypatch, capsys, "--workers", 0
    )
    assert "FILE.py, got elu" in error_of(monkeypatch, capsys, "--attention", "elu")


def test_there_are_as_many_workers_as_usable_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 500)  # of the host
    for platform, count in (("linux", 3), ("darwin", 500)):
        monkeypatch.setattr("sys.platform", platform)
        assert compare.processors() == compare.Settings().workers == count
    assert compare.Settings(device="cuda").workers == 1
