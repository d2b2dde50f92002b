"""studies.py and compare.py: correct answers, variants that match their names, no repeated runs."""

import math
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import nala_min
from nala_min import ATTENTIONS, data, measure, nala_attention, plots, runcard, train
from nala_min.flags import UsageError, run_script
from nala_min.lab import compare, premise, studies
from nala_min.lab.studies import (
    CHANGED_OPTIONS,
    STUDIES,
    VARIANTS,
    PairEmbedding,
    Recall,
    Sharpness,
    Study,
    Variant,
    separate_lambdas,
)
from nala_min.model import key_features, linear_attention, query_features

RECALL, SHARPNESS = STUDIES["recall"].task, STUDIES["sharpness"].task


def build(task, name, seed=1):
    torch.manual_seed(seed)
    net = task.build(VARIANTS[name])
    for layer in task.layers(net):
        VARIANTS[name].change(layer)
    return net


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
    task = RECALL
    batches = [task.batch(seed, step) for seed, step in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert torch.equal(batches[0][0], batches[1][0]) and torch.equal(batches[0][1], batches[1][1])
    assert all(not torch.equal(batches[0][0], other) for other, _ in batches[2:])
    assert {task.batch(1, step)[1].shape[1] for step in range(60)} == set(task.pairs)
    assert all(2048 - 128 <= task.batch(1, step)[0].numel() <= 2048 for step in range(9))


def test_an_untrained_model_recalls_nothing():
    task = RECALL
    shares = task.evaluate(build(task, "relu"))
    assert list(shares) == [f"accuracy at {pairs} pairs" for pairs in task.pairs]
    assert task.result == list(shares)[-1]
    assert all(0 <= share < 0.05 for share in shares.values())


def test_recall_counts_correct_answers():
    class Oracle(Recall):
        """Looks up every queried key but the first."""

        def answers(self, model, tokens, pairs):
            keys, values = tokens // 65, tokens % 65
            indices = (keys[:, pairs:, None] == keys[:, None, :pairs]).float().argmax(-1)
            values = values.gather(1, indices)
            values[:, 0] = (values[:, 0] + 1) % 64
            return torch.nn.functional.one_hot(values, 64).float()

    shares = Oracle(**vars(RECALL)).evaluate(torch.nn.Linear(1, 1))
    assert list(shares.values()) == pytest.approx([1 - 1 / pairs for pairs in (4, 8, 16, 32, 64)])


@pytest.mark.parametrize("of", [4, 16])
def test_sharpness_expects_one_value_or_the_mean_of_many(of):
    task = replace(SHARPNESS, of=of)
    inputs, targets = task.examples(3, seed=1, step=0)
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
    model = build(SHARPNESS, name).double()
    inputs, _ = SHARPNESS.examples(2, seed=1, step=0)
    queries, codes, values = inputs.double().split([20, 20, 8], dim=-1)
    short, long = model(queries / 2, codes, values), model(queries * 2, codes, values)
    assert torch.allclose(short, long, rtol=0, atol=1e-9) == blind


def test_sharpness_reports_both_errors_and_both_norms():
    model = build(SHARPNESS, "nala")
    results = SHARPNESS.evaluate(model)
    assert results["error"] == pytest.approx(
        (results["error of one"] + results["error of many"]) / 2
    )
    assert results["norm of one"] == pytest.approx(16 * results["norm of many"], rel=0.05)
    model = build(SHARPNESS, "tanh(norm/s)")
    assert model.norm_scale.tolist() == [4.0]


# --- Variants -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [RECALL, SHARPNESS], ids=["recall", "sharpness"])
def test_parameters_are_nearly_equal(task):
    def parameters(name):
        return sum(p.numel() for p in build(task, name).parameters())

    ours = parameters("nala")
    names = STUDIES["recall" if task is RECALL else "sharpness"].variants
    for name in names:
        if task is SHARPNESS and VARIANTS[name].heads == 0.5:
            assert parameters(name) == 2 * ours  # D = 32, for features of the same size
        else:
            assert parameters(name) == pytest.approx(ours, rel=0.01), name


def test_a_variant_has_the_heads_in_its_name():
    """As many as NaLa, or half as many with twice the channels; D = n gives n channels per head."""
    for name, variant in VARIANTS.items():
        _, _, channels = name.partition(", D = ")
        heads = 0.5 if name.endswith(", same state") else 1
        assert variant.heads == (16 / int(channels) if channels else heads), name
        if channels:
            layer = build(RECALL, name).blocks[0].attention
            assert layer.num_heads * int(channels) == 32
            assert variant.attention == name.split(",")[0]


@pytest.mark.parametrize(
    ("name", "heads", "features"), [("nala", 2, 32), ("elu, same state", 1, 32)]
)
def test_half_the_heads_make_a_state_as_large_as_nala_s(name, heads, features):
    model = build(RECALL, name)
    _, states = model(torch.zeros(1, 3, dtype=torch.long))
    values = 32 // heads + 1
    assert states[0].attention.shape == (1, heads, features, values)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nala", {}),
        ("lam 1", {"lam": 1.0}),
        ("tau 0", {"tau": 0.0}),
        ("alpha 2", {"alpha": 2.0}),
        ("split", {"feature_map": "split"}),
    ],
)
def test_a_variant_attends_as_its_name_says(name, options):
    layer = build(RECALL, name).blocks[0].attention
    q, k, v = torch.randn(3, 1, 2, 9, 16)
    out = layer.attend(q, k, v, causal=True, **layer.options(torch.zeros(1, 9, 32), 0))
    assert_close(out, nala_attention(q, k, v, causal=True, **options))


@pytest.mark.parametrize("lam", [1.0, 3.0, 4.5])
def test_queries_and_keys_with_separate_lams(lam):
    q, k, v = torch.randn(3, 2, 2, 9, 16)
    maps = partial(query_features, lam=lam), partial(key_features, lam=2.0)
    out = separate_lambdas(q, k, v, queries=lam, keys=2.0, causal=True)
    assert_close(out, linear_attention(q, k, v, *maps, causal=True))
    for name, options in (("queries", {"queries": 1.0}), ("keys", {"keys": 1.0})):
        layer = build(RECALL, f"lam 1 of {name}").blocks[0].attention
        assert layer.attend.keywords == options and layer.attend.func is separate_lambdas


def test_learned_lams_start_at_nala_s_and_all_have_gradients():
    q, k, v = torch.randn(3, 1, 2, 9, 16)
    layer = build(RECALL, "lam learned").blocks[0].attention
    out = layer.attend(q, k, v, causal=True)
    assert_close(out, nala_attention(q, k, v, causal=True))
    out.square().sum().backward()
    assert all((lam.grad != 0).all() for lam in (layer.attend.queries, layer.attend.keys))


@pytest.mark.parametrize("name", [name for name in CHANGED_OPTIONS if name != "no query norm"])
def test_a_changed_option_is_the_one_in_the_name(name):
    option, value = name.split()
    assert VARIANTS[name] == Variant(name)
    assert ATTENTIONS[name].func is nala_min.model.nala_attention
    assert ATTENTIONS[name].keywords == {option: float(value)}


def test_no_gate_fixes_the_gate_at_1_and_keeps_the_projections():
    x = torch.randn(1, 6, 32)
    layer = build(RECALL, "no gate").blocks[0].attention
    *_, gate = layer.project(x).chunk(4, dim=-1)
    assert_close(torch.nn.functional.silu(gate), torch.ones_like(gate), rtol=0, atol=1e-6)
    plain = build(RECALL, "nala").blocks[0].attention
    q_k_v = [layer.project(x)[..., :96], plain.project(x)[..., :96]]
    assert torch.equal(*q_k_v)


@pytest.mark.parametrize("part", ["gate", "convolution"])
def test_a_part_of_the_block_is_missing_where_the_name_says_so(part):
    """The attention is the one in the name, or NaLa."""
    x, without = torch.randn(1, 6, 32), f"no {part}"
    for name, variant in VARIANTS.items():
        layer = build(RECALL, name).blocks[0].attention
        *_, gate = layer.project(x).chunk(4, dim=-1)
        constant = gate if part == "gate" else layer.local(x, None)[0]
        missing = bool((constant == constant[0, 0, 0]).all())
        assert missing == name.endswith(without), name
        if missing:
            assert variant.attention == (name.removesuffix(without).removesuffix(", ") or "nala")


def test_queries_and_keys_begin_5_times_as_large():
    large, plain = (
        build(RECALL, name).blocks[0].attention.project.weight
        for name in ("q and k 5 times as large", "nala")
    )
    assert_close(large, torch.cat([5 * plain[:64], plain[64:]]))


def test_every_study_names_variants_and_nala_first():
    for study in STUDIES.values():
        assert VARIANTS[study.variants[0]].attention == "nala"
        assert set(study.variants) <= VARIANTS.keys()
        assert study.seeds >= 3
        assert {name for pair in study.questions for name in pair} <= set(study.variants)
        replace(study.task, **study.quick)


def test_the_recipes_are_the_scripts_():
    """Except for their length and schedule, and nanoGPT's recipe."""
    import train_cifar
    import train_shakespeare

    rates = ("lr", "muon", "weight_decay")
    for name in ("text", "text-powers", "text-convolution", "text-rates", "text-gpu"):
        preset = "gpu" if name == "text-gpu" else "cpu"
        task, script = STUDIES[name].task, train_shakespeare.PRESETS[preset]
        assert task.sizes == (script["layers"], script["heads"], script["dim"])
        assert (task.block, task.windows) == (script["block"], script["batch"])
        assert (task.learning_rate, task.dropout) == (script["lr"], script["dropout"])
        if preset == "cpu":
            recipe = task.learning_rate, task.muon, task.weight_decay
            assert recipe == tuple(script[x] for x in rates) and task.schedule == "linear"
    for name in ("images", "images-rates"):
        task, script = STUDIES[name].task, train_cifar.PRESETS["cpu"]
        assert task.sizes == (script["layers"], script["heads"], script["dim"])
        assert [task.patch, task.images, task.shift] == [
            script[x] for x in ("patch", "batch", "shift")
        ]
        recipe = task.learning_rate, task.muon, task.weight_decay
        assert recipe == tuple(script[x] for x in rates) and task.schedule == "linear"


def test_a_variant_s_rates_multiply_those_of_the_task(tmp_path, monkeypatch):
    recipes = []

    def fit(model, recipe, **options):
        recipes.append(recipe)
        return [{"step": 1, "train_loss": 1.0}], 0.0

    monkeypatch.setattr(train, "fit", fit)
    task = replace(RECALL, weight_decay=0.25, schedule="cosine")
    for name in ("elu", "elu, half rates", "elu, double rates"):
        compare.run(task, name, 1, tmp_path)
    first, half, double = recipes
    assert (first.weight_decay, first.schedule) == (0.25, "cosine")  # not the recipe's defaults
    for recipe, factor in ((half, 0.5), (double, 2.0)):
        rates = {"learning_rate": factor * first.learning_rate, "muon": factor * first.muon}
        assert recipe == replace(first, **rates)


def test_held_out_data_is_not_trained_on(tmp_path, monkeypatch):
    """The last tenth of the training text, or the last training images."""
    (tmp_path / "text.txt").write_text("abcdefghij" * 40, encoding="utf-8")
    whole = replace(STUDIES["text"].task, block=2, file=tmp_path / "text.txt")
    (training, validation), (all_training, _) = replace(whole, held_out=True).parts(), whole.parts()
    assert torch.equal(torch.cat([training, validation]), all_training)
    assert len(training) == 324 and len(all_training) == 360
    images = data.drawn_images(30, 10)
    monkeypatch.setattr(studies, "_images", lambda *source: images)
    split = replace(STUDIES["images-rates"].task, held_out=7).load()
    for before, training, held_out in zip(images.train, split.train, split.test, strict=True):
        assert len(held_out) == 7
        assert torch.equal(torch.cat([training, held_out]), before)


# --- Numbers --------------------------------------------------------------------------------------


def rows(**results):
    return [
        {"variant": name, "seed": seed, "loss": value}
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


@pytest.mark.parametrize("pairs", [2, 3, 5])
def test_an_interval_covers_the_truth_in_95_percent_of_studies(pairs):
    random = np.random.default_rng(1)
    draws = random.standard_normal((1500, pairs))
    inside = [
        float(abs(gap) <= half)
        for gap, half in (compare.difference(list(row), [0.0] * pairs) for row in draws)
    ]
    assert mean(inside) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("pairs", [2, 3, 5, 8, 20])
def test_a_p_value_is_0_05_at_the_end_of_an_interval(pairs):
    end = compare.T_QUANTILES[pairs - 2]
    assert compare.p_value(end, pairs) == pytest.approx(0.05, abs=1e-4)
    assert compare.p_value(-end, pairs) == compare.p_value(end, pairs)
    assert compare.p_value(0.0, pairs) == 1.0


def test_holm_corrects_for_the_number_of_tests():
    """By hand: the smallest times 4, the next times 3, and so on; increasing, and at most 1."""
    assert compare.holm([0.04, 0.01, 0.5, 0.015]) == pytest.approx([0.08, 0.04, 0.5, 0.045])
    assert compare.holm([0.3, 0.6]) == [0.6, 0.6]
    assert compare.holm([0.03, 0.02, 0.025]) == pytest.approx([0.06, 0.06, 0.06])
    assert compare.holm([]) == []


def test_a_study_s_answers_are_corrected_for_their_number():
    """The smallest of three p-values is tripled. A difference of 0 has a p-value of 1."""
    questions = (("elu", "nala"), ("split", "elu"), ("relu", "nala"))
    task = replace(SMALL.task, steps=1)
    study = Study(task, {}, ("nala", "elu", "split", "relu"), questions=questions)
    numbers = {"nala": [1.0, 2.0, 3.0], "elu": [2.0, 3.1, 3.9], "split": [2.1, 2.9, 4.3]}
    results = rows(**numbers, relu=numbers["nala"])
    for row in results:
        row[task.result] = row.pop("loss")
    first, second, third = compare.answers(results, study)
    assert (first.variant, first.baseline) == ("elu", "nala")
    assert (first.difference, first.half_width) == compare.difference(
        numbers["elu"], numbers["nala"]
    )
    t = 4.303 * first.difference / first.half_width
    assert first.p == pytest.approx(3 * compare.p_value(t, 3))
    assert second.difference == pytest.approx(0.1) and first.p < second.p
    assert (third.difference, third.p) == (0.0, 1.0)


def test_softmax_with_one_norm_depends_only_on_a_query_s_direction():
    """The output is the same for queries shorter and longer than the head's norm."""
    attend = build(STUDIES["text"].task, "softmax, one norm").blocks[0].attention.attend
    q, k, v = torch.randn(3, 1, 4, 6, 24)
    with torch.no_grad():
        attend.norm.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    expected = ATTENTIONS["softmax"](attend.norm[:, None, None] * F.normalize(q, dim=-1), k, v)
    for size in (0.01, 1.0, 100.0):
        assert_close(attend(size * q, k, v, causal=False), expected)


def test_the_table_has_mean_bounds_and_difference():
    text = compare.table(rows(nala=[1.0, 2.0, 3.0], elu=[2.0, 3.5, 3.5]), "loss")
    heading, nala, elu = text.splitlines()
    assert heading.split()[:2] == ["loss", "mean"]
    assert nala.split() == ["nala", "2.0000", "1.0000", "3.0000"]
    assert elu.split() == ["elu", "3.0000", "2.0000", "3.5000", "+1.0000", "±", "1.2422"]


def test_a_study_s_picture_has_its_runs():
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
        strokes = [line.get_xdata()[0] for line in axes.lines if line.get_marker() != "o"]
        assert strokes == pytest.approx([1.5 / unit] * 2)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_can_be_drawn_and_tabled(name):
    """From the results that its runs return."""
    study, task = STUDIES[name], STUDIES[name].task
    results = {task.result: 0.5, "error of one": 0.5, "error of many": 0.5}
    results |= {f"accuracy at {pairs} pairs": 0.5 for pairs in getattr(task, "pairs", ())}
    rows = [{"variant": v, "seed": 1} | results for v in study.variants]
    assert task.draw(rows).axes
    assert len(compare.table(rows, task.result).splitlines()) == 1 + len(rows)


def test_the_picture_of_recall_has_a_line_and_a_band_for_each_attention():
    shares = {f"accuracy at {pairs} pairs": 1 / pairs for pairs in RECALL.pairs}
    results = [{"variant": name} | shares for name in plots.VARIANT_STYLES for _ in range(2)]
    (axes,) = RECALL.draw(results).axes
    assert len(axes.lines) == len(axes.collections) == len(plots.VARIANT_STYLES)
    for line in axes.lines:
        assert list(line.get_ydata()) == pytest.approx([1 / pairs for pairs in RECALL.pairs])


# --- Runs -----------------------------------------------------------------------------------------


SMALL = replace(
    STUDIES["sharpness"],
    task=replace(SHARPNESS, steps=12),
    variants=("nala", "elu", "magnitude-aware"),
    seeds=2,
)


def test_a_run_is_a_function_of_its_seed_and_resumes_where_it_stopped(tmp_path, monkeypatch):
    task, varying = replace(SHARPNESS, steps=12), ("seconds",)
    whole = compare.run(task, "nala", 1, tmp_path / "whole")
    again = compare.run(task, "nala", 1, tmp_path / "again")
    other = compare.run(task, "nala", 2, tmp_path / "other")
    plain = [{k: v for k, v in row.items() if k not in varying} for row in (whole, again, other)]
    assert plain[0] == plain[1] != plain[2]
    assert whole["variant"] == "nala" and whole["seed"] == 1 and whole["parameters"] == 640

    batch = Sharpness.batch

    def stopped(self, seed, step):
        if step == 7:
            raise KeyboardInterrupt
        return batch(self, seed, step)

    monkeypatch.setattr(Sharpness, "batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare.run(task, "nala", 1, tmp_path / "stopped")
    monkeypatch.setattr(Sharpness, "batch", batch)
    resumed = compare.run(task, "nala", 1, tmp_path / "stopped")
    assert {k: v for k, v in resumed.items() if k not in varying} == plain[0]


def test_a_study_s_time_is_that_of_its_steps(tmp_path, monkeypatch):
    """NaLa's two steps take 1 minute, elu's 3. The workers share the unfinished runs."""
    slow = {"nala": 30.0, "elu": 90.0}
    monkeypatch.setattr(compare, "seconds_of_a_step", lambda task, name, device: slow[name])
    study = replace(SMALL, task=replace(SMALL.task, steps=2), variants=("nala", "elu"), seeds=2)
    two, three = compare.Settings(workers=2), compare.Settings(workers=3)
    assert compare.minutes_left(study, tmp_path, two) == (1 + 3) * 2 / 2
    for done, left in (("nala_seed2", (1 + 3 + 3) / 3), ("elu_seed1", (1 + 3) / 2)):
        (tmp_path / done).mkdir()
        identity = compare._identity(study.task, done.split("_")[0])
        runcard.write_json(tmp_path / done / "row.json", identity | {"row": {}})
        assert compare.minutes_left(study, tmp_path, three) == left
    monkeypatch.undo()
    assert 0 < compare.seconds_of_a_step(study.task, "nala") < 10


def test_a_flag_sets_the_number_of_seeds():
    study = compare.configured_study(compare.Settings(seeds=8), "recall")
    assert (study.seeds, compare.configured_study(compare.Settings(), "recall").seeds) == (8, 5)
    assert compare.configured_study(compare.Settings(seeds=2, quick=True), "recall").seeds == 2
    card = compare.study_card(compare.Settings(seeds=8), "recall", study, [{"seconds": 1.0}])
    assert card["command"] == "python -m nala_min.lab.compare --study recall --seeds 8"
    assert card["config"]["seeds"] == 8
    for count in (0, 21):
        with pytest.raises(UsageError, match=f"--seeds must be from 1 to 20, got {count}"):
            compare.Settings(seeds=count)


def test_a_study_writes_its_card_and_repeats_no_finished_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(compare.STUDIES, "sharpness", SMALL)
    argv = ["compare", "--study", "sharpness", "--workers", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", argv)
    run_script(compare.main)
    printed = capsys.readouterr()
    card = runcard.read_json(tmp_path / "sharpness.json")
    assert card["command"] == "python -m nala_min.lab.compare --study sharpness"
    assert card["config"]["variants"] == list(SMALL.variants)
    assert card["config"]["task"]["steps"] == 12
    assert (tmp_path / "sharpness.png").read_bytes().startswith(b"\x89PNG")
    runs = [(row["variant"], row["seed"]) for row in card["results"]["runs"]]
    assert runs == [(name, seed) for seed in (1, 2) for name in SMALL.variants]
    assert compare.table(card["results"]["runs"], "error") in printed.out
    assert printed.err.count("6/6") >= 1 and "training" not in printed.err  # a single progress bar

    def never(*args):
        raise AssertionError("run again")

    monkeypatch.setattr(compare, "_run_in_worker", never)
    run_script(compare.main)
    assert runcard.read_json(tmp_path / "sharpness.json")["results"] == card["results"]
    assert "6/6" in capsys.readouterr().err


def test_initial_weights_depend_on_the_seed_and_not_on_the_attention(tmp_path, monkeypatch):
    weights, build = {}, Sharpness.build

    def recording(self, variant):
        model = build(self, variant)
        weights[len(weights)] = model.query.weight.detach().clone()
        return model

    monkeypatch.setattr(Sharpness, "build", recording)
    for i, (name, seed) in enumerate((("nala", 1), ("elu", 1), ("nala", 2))):
        compare.run(replace(SHARPNESS, steps=1), name, seed, tmp_path / str(i))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    "other",
    [{"task": "another"}, {"data": {"name": "a stand-in"}}, {"code_sha256": "of an edited file"}],
)
def test_rows_of_another_recipe_or_other_data_or_code_are_ignored(other, tmp_path, monkeypatch):
    study = replace(SMALL, variants=("nala",), seeds=1)
    folder = tmp_path / "nala_seed1"
    folder.mkdir()
    identity = compare._identity(study.task, "nala")
    assert identity.keys() == {"task", "data", "code_sha256"}
    runcard.write_json(folder / "row.json", identity | {"row": {"error": 0}})
    assert compare.finished(study, tmp_path) == {("nala", 1): {"error": 0}}
    runcard.write_json(folder / "row.json", identity | other | {"row": {"error": 0}})
    assert compare.finished(study, tmp_path) == {("nala", 1): None}


@pytest.mark.parametrize("name", ["compare", "model", "fast", "train", "studies"])
def test_an_edit_of_the_training_code_makes_another_run(name, tmp_path, monkeypatch):
    before = compare._identity(SMALL.task, "nala")["code_sha256"]
    module = compare if name == "compare" else getattr(compare, name)
    edited = tmp_path / "edited.py"
    edited.write_bytes(Path(module.__file__).read_bytes() + b"# edited\n")
    monkeypatch.setattr(module, "__file__", str(edited))
    assert compare._identity(SMALL.task, "nala")["code_sha256"] != before


def test_ctrl_c_says_to_run_the_same_command(tmp_path, monkeypatch):
    def interrupted(jobs):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "as_completed", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="run the same command to continue"):
        compare.run_all(replace(SMALL, variants=("nala",), seeds=1), tmp_path, 1, "cpu")
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("damaged", [b"", b"{", b"[1]", b"3", b"\xff"])
def test_a_damaged_row_is_ignored(damaged, tmp_path):
    study = replace(SMALL, variants=("nala",), seeds=1)
    (tmp_path / "nala_seed1").mkdir()
    (tmp_path / "nala_seed1" / "row.json").write_bytes(damaged)
    assert compare.finished(study, tmp_path) == {("nala", 1): None}


# --- The premise in trained models ----------------------------------------------------------------


def test_the_premise_is_measured_on_a_study_s_models(tmp_path, monkeypatch, capsys):
    """After two steps of every attention, the card has the models' correlations and points."""
    (tmp_path / "text.txt").write_text("to be, or not to be: " * 60, encoding="utf-8")
    task = replace(STUDIES["text"].task, steps=2, sizes=(2, 2, 16), block=16, windows=2)
    monkeypatch.setitem(premise.STUDIES, "text", Study(task, {}, studies.MAIN_ATTENTIONS, seeds=2))
    here = replace(task, file=tmp_path / "text.txt")
    runs = tmp_path / "runs" / "text"
    for name in studies.MAIN_ATTENTIONS:
        for seed in (1, 2):
            compare.run(here, name, seed, compare._run_folder(runs, name, seed))
    flags = ["--runs", runs.parent, "--data", tmp_path / "text.txt", "--out", tmp_path]
    monkeypatch.setattr("sys.argv", ["premise.py", *map(str, flags)])
    run_script(premise.main)
    assert (tmp_path / "premise_text.png").read_bytes().startswith(b"\x89PNG")
    card = runcard.read_json(tmp_path / "premise_text.json")
    assert card["command"] == "python -m nala_min.lab.premise --study text"
    inputs = here.inputs(1000)
    assert card["config"] == {"study": "text", "seeds": 2, "inputs": len(inputs)}
    for name in studies.MAIN_ATTENTIONS:
        for seed in (1, 2):
            model = compare.load_trained(here, name, seed, runs)
            blocks = measure.norms_and_entropies(model, inputs)
            rows = [
                row
                for row in card["results"]["correlations"]
                if (row["variant"], row["seed"]) == (name, seed)
            ]
            assert [row["block"] for row in rows] == [1, 2]
            for row, block in zip(rows, blocks, strict=True):
                for norm in ("query_norm", "key_norm"):
                    heads = measure.rank_correlation(block[norm], block["entropy"])
                    assert row[norm] == pytest.approx(heads.mean().item(), abs=1e-4)
            if seed == 1:
                for key, heads in card["results"]["points"][name].items():
                    assert heads == [
                        [round(x, 4) for x in head] for head in blocks[-1][key].tolist()
                    ]
    capsys.readouterr()
    for mistake, named in ((["--data-dir", "x", "--study", "images"], "--data-dir"), ([], "split")):
        monkeypatch.setattr(premise, "MAIN_ATTENTIONS", ("split",))  # it has no run
        monkeypatch.setattr("sys.argv", ["premise.py", *map(str, flags), *mistake])
        with pytest.raises(SystemExit, match="2"):
            run_script(premise.main)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and named in error


def test_an_unfinished_run_or_another_recipe_s_is_not_loaded(tmp_path):
    task = replace(SHARPNESS, steps=2)
    compare.run(task, "nala", 1, compare._run_folder(tmp_path, "nala", 1))
    assert isinstance(compare.load_trained(task, "nala", 1, tmp_path), studies.SingleLayer)
    other = replace(task, learning_rate=1.0)
    with pytest.raises(UsageError, match="is not from a finished run of this study"):
        compare.load_trained(other, "nala", 1, tmp_path)
    with pytest.raises(UsageError, match="nala_seed2"):
        compare.load_trained(task, "nala", 2, tmp_path)
    path = compare._run_folder(tmp_path, "nala", 1) / "checkpoint.pt"
    torch.save(torch.load(path, weights_only=True) | {"step": 1}, path)
    with pytest.raises(UsageError, match="is not from a finished run of this study"):
        compare.load_trained(task, "nala", 1, tmp_path)


# --- Checks before any work -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("affinity", "quota", "count"),
    [
        (128, None, 61),
        (8, "max 100000", 8),
        (8, "250000 100000", 3),
        (2, "800000 100000", 2),
        (8, "1000 100000", 1),
        (8, "nonsense", 8),
    ],
)
def test_there_are_as_many_workers_as_usable_processors(
    affinity, quota, count, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "cpu_count", lambda: 500)  # of the host
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    monkeypatch.setattr(os, "process_cpu_count", lambda: affinity, raising=False)
    monkeypatch.setattr(compare, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n", encoding="ascii")
    assert compare.processors() == count
    compare.Settings(workers=count)


@pytest.mark.parametrize(("cpu_count", "count"), [(None, 1), (7, 7), (100, 61)])
def test_without_affinity_all_processors_count(cpu_count, count, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cpu_count)
    monkeypatch.setattr(compare, "CPU_QUOTA", tmp_path / "none")
    assert compare.processors() == count


def error_of(monkeypatch, capsys, *flags):
    """compare's error message, printed before any training."""
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, flags)])
    monkeypatch.setattr(compare, "run_all", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit, match="2"):
        run_script(compare.main)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "name", ["recall.json", "text.png", "sharpness", "recall/elu_seed3/row.json"]
)
def test_unwritable_output_of_the_last_study_is_an_error_before_the_first(
    name, tmp_path, monkeypatch, capsys
):
    small = {n: replace(SMALL, variants=("nala", "elu"), seeds=3) for n in ("recall", "sharpness")}
    monkeypatch.setattr(compare, "STUDIES", {"text": SMALL} | small)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.mkdir() if path.suffix else path.touch()
    error = error_of(monkeypatch, capsys, "--out", tmp_path)
    assert "cannot be written" in error and path.name in error
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p != path] == []


def test_the_last_study_s_data_and_attention_file_are_checked_before_the_first(
    tmp_path, monkeypatch, capsys
):
    text = STUDIES["text"]
    monkeypatch.setattr(compare, "STUDIES", {"sharpness": SMALL, "text": text})
    missing = tmp_path / "missing.txt"
    assert "missing.txt" in error_of(monkeypatch, capsys, "--data", missing, "--out", tmp_path)
    wrong = tmp_path / "wrong.py"
    wrong.write_text("1 / 0\n", encoding="utf-8")
    assert "wrong.py" in error_of(monkeypatch, capsys, "--attention", wrong, "--out", tmp_path)


def test_a_checkpoint_of_another_task_is_an_error_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "STUDIES", {"sharpness": SMALL})
    folder = tmp_path / "sharpness" / "elu_seed1"
    compare.run(replace(SMALL.task, steps=1), "elu", 1, folder)
    capsys.readouterr()  # the progress bar
    error = error_of(monkeypatch, capsys, "--out", tmp_path)
    assert f"{folder / 'checkpoint.pt'} is from another task" in error and "move it aside" in error


def test_impossible_flags_are_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["compare", "--workers", "0"])
    with pytest.raises(SystemExit, match="2"):
        run_script(compare.main)
    assert "--workers must be from 1 to 61, got 0" in capsys.readouterr().err
    with pytest.raises(UsageError):
        compare.Settings(workers=-1)
    missing = str(tmp_path / "missing.txt")
    monkeypatch.setattr("sys.argv", ["compare", "--study", "text", "--data", missing])
    with pytest.raises(SystemExit, match="2"):
        run_script(compare.main)
    assert "missing.txt" in capsys.readouterr().err


def test_a_variant_that_changes_nothing_is_the_plain_model():
    assert Variant().change(None) is None and VARIANTS["nala"] == Variant()
