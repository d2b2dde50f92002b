"""notebooks/results/README.md: every number, table and verdict agrees with the run cards."""

import re
import shlex
from dataclasses import fields, replace
from functools import partial
from statistics import mean
from typing import NamedTuple

import faults
import pytest

import train_cifar
import train_shakespeare
from nala_min import runcard
from nala_min.flags import parse_flags
from nala_min.lab import bench, compare
from nala_min.lab.studies import STUDIES

PAGE = (runcard.RESULTS / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(PAGE.split()).replace(" %", "%")
ATTENTIONS = ("nala", "softmax", "elu", "relu")
LABELS = {"softmax": "softmax", "elu": "elu + 1", "relu": "ReLU"}


def read(name):
    return runcard.read_json(runcard.RESULTS / f"{name}.json")


def markdown(heading, rows):
    """A table with a short rule below its heading."""
    first, *others = (f"| {' | '.join(line)} |" for line in (heading, *rows))
    return "\n".join([first, "|---|", *others])


def assert_has_table(text):
    assert f"\n\n{text}\n\n" in re.sub(r"(?m)^\|[ |-]+\|$", "|---|", PAGE)


# --- The scripts' recipes -------------------------------------------------------------------------


class Table(NamedTuple):
    """How the page shows the runs of a script's default recipe with four attentions."""

    result: str  # its key in the cards
    heading: str  # its name on the page
    form: str  # format of a result
    difference: str  # format of a difference and its half-width
    unit: int  # factor of the difference
    better: int  # 1: higher is better; -1: lower
    data: str


TABLES = {
    "shakespeare": Table(
        "validation_loss", "loss", "{:.3f}", "{:+.3f} ± {:.3f}", 1, -1, "Tiny Shakespeare"
    ),
    "cifar": Table(
        *("test_accuracy", "accuracy", "{:.1%}", "{:+.1f} ± {:.1f} points", 100, 1),
        "CIFAR-10 (files in a folder)",
    ),
}


def cards(task, attention):
    """The committed cards of a task's default run with one attention, sorted by seed."""
    paths = runcard.RESULTS.glob(f"{task}_cpu_{attention}_seed*.json")
    return sorted((runcard.read_json(path) for path in paths), key=lambda c: c["config"]["seed"])


def final_results(task, attention):
    return [card["results"][TABLES[task].result] for card in cards(task, attention)]


def default(task):
    return read(f"{task}_cpu_default")


def verdict(task):
    """NaLa against the others by a task's 95 % intervals, in the words of both pages."""
    groups = {"ahead of": [], "behind": [], "level with": []}
    for name, label in LABELS.items():
        gap, half = compare.difference(final_results(task, name), final_results(task, "nala"))
        lead = -gap * TABLES[task].better
        group = "level with" if abs(lead) < half else "ahead of" if lead > 0 else "behind"
        groups[group].append(label)
    listed = {group: " and ".join(", ".join(x).rsplit(", ", 1)) for group, x in groups.items() if x}
    return ", ".join(f"{group} {names}" for group, names in listed.items())


def small_tasks():
    """The sentence of both pages about text and images."""
    text, images = verdict("shakespeare"), verdict("cifar")
    if text == images:
        return f"On Shakespeare and on CIFAR-10, NaLa is {text}."
    return f"On Shakespeare, NaLa is {text}; on CIFAR-10, it is {images}."


@pytest.mark.parametrize("task", TABLES)
def test_the_results_of_a_script_agree_with_its_run_cards(task):
    table, rows, seen = TABLES[task], [], [card for x in ATTENTIONS for card in cards(task, x)]
    for name in ATTENTIONS:
        values, gap = final_results(task, name), ""
        if name != "nala":
            interval = compare.difference(values, final_results(task, "nala"))
            gap = table.difference.format(*(table.unit * number for number in interval))
        low, middle, high = map(table.form.format, (min(values), mean(values), max(values)))
        rows.append([f"`{name}`", f"**{middle}**", f"{low} to {high}", gap])
    heading = [f"attention, {table.heading}", "mean", "lowest to highest", "minus NaLa's"]
    assert_has_table(markdown(heading, rows).replace("%", " %"))
    section = PROSE[PROSE.index("## Text" if task == "shakespeare" else "## Images") :]
    assert f" NaLa is {verdict(task)}. " in section and small_tasks() in PROSE
    # The runs differ in attention and seed only.
    same = {"attention": "", "seed": 0}
    for card in seen:
        assert (card["data"], card["versions"]) == (seen[0]["data"], seen[0]["versions"])
        assert card["config"] | same == seen[0]["config"] | same
        assert card["results"]["parameters"] == seen[0]["results"]["parameters"]
        assert card["hardware"]["threads"] == 1 and card["data"]["name"] == table.data
    runs = {(card["config"]["attention"], card["config"]["seed"]) for card in seen}
    assert len(runs) == len(seen) == 5 * len(ATTENTIONS)


@pytest.mark.parametrize(
    ("task", "command"),
    [
        ("shakespeare", "python train_shakespeare.py"),
        ("cifar", "python train_cifar.py --data-dir ."),
    ],
)
def test_the_default_run_agrees_with_its_run_card(task, command):
    card, form = default(task), TABLES[task].form
    assert card["command"] == command
    number = form.format(card["results"][TABLES[task].result])
    assert f"reached {number} after {card['seconds']:.0f} s of training" in PROSE
    assert card["config"] == cards(task, "nala")[0]["config"]
    assert card["seconds"] < 300
    assert f"({card['results']['parameters'] / 1e6:.2f} M parameters)" in PROSE


# --- Studies --------------------------------------------------------------------------------------

CARDS = {
    path.stem.removeprefix("compare_"): runcard.read_json(path)
    for path in sorted(runcard.RESULTS.glob("compare_*.json"))
}
# Columns of the tables of variants: {study: (heading, format)}.
COLUMNS = {
    "recall": ("recall ↑", "{:.2f}"),
    "sharpness": ("one or its group ↓", "{:.3f}"),
    "sharpness-all": ("one or all ↓", "{:.3f}"),
    "text": ("text ↓", "{:.3f}"),
    "images": ("images ↑", "{:.3f}"),
}
MAIN = (
    *("nala", "softmax", "elu", "elu, same state", "relu", "relu, same state", "no query norm"),
    "no cosine map, same state",
)


def base_of(study):
    """The study, or the one that an earlier study was derived from."""
    return STUDIES.get(study) or STUDIES[study.partition("-")[0]]


def runs_of(study):
    return CARDS[study]["results"]["runs"]


def results_of(study, variant, result=None):
    return compare.values(runs_of(study), variant, result or base_of(study).task.result)


def difference_of(study, variant, baseline="nala"):
    """Mean difference of variant's result from the baseline's, and the 95 % half-width."""
    return compare.difference(results_of(study, variant), results_of(study, baseline))


def answers_of(study, questions=None):
    asked = base_of(study)
    asked = replace(asked, questions=questions) if questions else asked
    return compare.answers(runs_of(study), asked)


def p_of(answer):
    return "< 0.001" if answer.p < 0.001 else f"{answer.p:.3f}"


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_s_card_is_of_the_current_study(study):
    """A card may have more variants: those that only an earlier commit can run."""
    card, now = CARDS[study], STUDIES[study]
    tried = card["config"]["variants"]
    runs = [(row["variant"], row["seed"]) for row in runs_of(study)]
    assert runs == [(v, seed) for seed in range(1, now.seeds + 1) for v in tried]
    assert set(now.variants) <= set(tried) and card["config"]["seeds"] == now.seeds
    task = {x.name: getattr(now.task, x.name) for x in fields(now.task) if x.repr}
    task = {name: list(x) if isinstance(x, tuple) else x for name, x in task.items()}
    assert task.items() <= card["config"]["task"].items()
    assert card["command"] == f"python -m nala_min.lab.compare --study {study}"


def test_the_tables_of_variants_agree_with_their_cards():
    tried = dict.fromkeys(row["variant"] for name in COLUMNS for row in runs_of(name))
    current = {name for study in STUDIES.values() for name in study.variants}
    rest = [name for name in tried if name not in MAIN]
    rest = [*(x for x in rest if x in current), *(x for x in rest if x not in current)]
    (first_gone,) = [x for x, before in zip(rest[1:], rest, strict=False)
                     if before in current and x not in current]  # fmt: skip
    assert f"from `{first_gone}` on" in PROSE
    heading = ["attention", *(heading for heading, _ in COLUMNS.values())]
    for names in (MAIN, rest):
        rows = []
        for name in names:
            cells = []
            for study, (_, form) in COLUMNS.items():
                values = results_of(study, name)
                shown = [form.format(f(values)) for f in (mean, min, max)] if values else []
                cells.append("{} ({} to {})".format(*shown) if values else "")
            rows.append([f"`{name}`", *cells])
        assert_has_table(markdown(heading, rows))


def shown(study, variant, form="{:+.2f} ± {:.2f}", baseline="nala"):
    return form.format(*difference_of(study, variant, baseline))


def test_the_numbers_about_variants_agree_with_their_cards():
    norms = {kind: results_of("sharpness", "nala", f"norm of {kind}") for kind in ("one", "many")}
    channels = [mean(results_of("recall", f"nala, D = {n}")) for n in (4, 8, 32)]
    (more,) = answers_of("recall-powers", (("lam 2", "nala"),))
    three = "{:+.3f} ± {:.3f}"
    for sentence in (
        f"error is {shown('sharpness', 'no query norm').lstrip('+')} larger",
        f"recalls {shown('recall', 'no cosine map, same state').lstrip('-')} less",
        f"norm of {min(norms['one']):.1f} to {max(norms['one']):.1f} and short ones to"
        f" {min(norms['many']):.2f} to {max(norms['many']):.2f}",
        f"without the norm, recall changes by {shown('recall', 'no query norm')}",
        f"start five times as large ({shown('recall', 'q and k 5 times as large')})",
        f"λ = 1 for keys only, recall changes by {shown('recall', 'lam 1 of keys')}, for queries"
        f" only by {shown('recall', 'lam 1 of queries')}",
        "4 channels recall {:.2f}, four of 8 as much as two of 16 ({:.2f}), one of 32 less again"
        " ({:.2f})".format(*channels),
        "heads of 4 channels recall"
        f" {shown('recall', 'no query norm, D = 4', baseline='nala, D = 4')} more",
        f"With λ = 1, recall drops ({shown('recall', 'lam 1')})",
        f"With λ = 2 it may rise ({shown('recall', 'lam 2', three)}",
        f"λ = 2 recalls {more.difference:+.2f} ± {more.half_width:.2f} more (p = {more.p:.3f})",
        f"one of its runs falls to {min(results_of('recall-powers', 'lam 2')):.2f}",
        "recalls {:.0%} of 64 values instead of {:.0%}".format(
            *(mean(results_of("recall", name)) for name in ("lam 1", "nala"))
        ),
        "NaLa falls to {:.2f} at 64 pairs, without the query norm to {:.2f}; elu + 1 with an"
        " equally large state to {:.2f}; NaLa with ReLU instead of cosines, with the same state"
        " size, to {:.2f}".format(
            *(mean(results_of("recall", name))
              for name in ("nala", "no query norm", "elu, same state", MAIN[-1]))
        ),
        "the query norm lie at {:.2f} and {:.2f}, elu + 1 with an equally large state at {:.2f} and"
        " {:.2f}".format(
            *(mean(results_of("sharpness", name, f"error of {kind}"))
              for name in ("no query norm", "elu, same state") for kind in ("one", "many"))
        ),
    ):  # fmt: skip
        assert sentence in PROSE, sentence
    names = ("recall", "sharpness", "text")  # the default studies
    rows = [row for name in names for row in runs_of(name)
            if row["variant"] in STUDIES[name].variants]  # fmt: skip
    minutes = sum(row["seconds"] for row in rows) / 2 / 60
    assert f"takes about {minutes:.0f} minutes on two cores" in PROSE and minutes < 120


def test_the_readme_s_conclusions_follow_from_the_cards():
    """Conclusions 1 and 2, and the claims about the norm, the cosine map and the settings."""
    # Every run is ahead of elu + 1 and ReLU with equally large states; softmax recalls everything.
    for name in ("elu, same state", "relu, same state"):
        assert min(results_of("recall", "nala")) > max(results_of("recall", name))
        assert max(results_of("sharpness", "nala")) < min(results_of("sharpness", name))
    assert min(results_of("recall", "softmax")) == 1 > max(results_of("recall", "nala"))
    # Where a query may have to average all keys, elu + 1 is better than NaLa and ReLU is worse.
    ours, elu, relu = (
        results_of("sharpness-all", name)
        for name in ("nala", "elu, same state", "relu, same state")
    )
    assert mean(elu) < mean(ours) and min(relu) > max(ours)
    # Without the norm, NaLa is as bad as ReLU; without the cosine map, it recalls far less.
    norm, relu = (mean(results_of("sharpness", n)) for n in ("no query norm", "relu, same state"))
    assert norm == pytest.approx(relu, abs=0.001)
    for study, name, significant in (
        ("sharpness", "no query norm", True),
        ("recall", "no cosine map, same state", True),
        ("sharpness", "no cosine map, same state", False),
        ("sharpness", "magnitude-aware, same state", False),
        ("recall", "no query norm", False),
        ("recall", "q and k 5 times as large", False),
    ):
        middle, half = difference_of(study, name)
        assert (abs(middle) > half) == significant, (study, name)
    # No other lam, tau, alpha or tanh is significantly better; a few are significantly worse.
    for study, worse in {
        "recall": {"lam 1", "lam 1 of keys"},
        "sharpness": {"alpha 2", "lam 1"},
        "sharpness-all": {"alpha 2"},
    }.items():
        sign = 1 if study == "recall" else -1
        for name in {row["variant"] for row in runs_of(study)}:
            if name[:3] in ("lam", "tau", "alp", "tan"):
                middle, half = difference_of(study, name)
                assert sign * middle < half, (study, name)
                assert name not in worse or sign * middle < -half


VARIANT_LABELS = {
    "softmax": "softmax",
    "elu": "elu + 1",
    "relu": "ReLU",
    "split": "sign split",
    "no query norm": "NaLa without its norm",
    "no cosine map": "NaLa with ReLU for its cosines",
    "one norm": "softmax with one norm",
}


def label_of(variant):
    """A variant's name on the page."""
    first, *rest = variant.removeprefix("softmax, ").split(", ")
    return ", ".join([VARIANT_LABELS[first], *rest])


def test_the_answers_of_text_and_images_are_their_cards():
    """Neither the norm nor the cosine map holds NaLa back; softmax does not need the norm."""
    rows, clear = [], {"text": [], "images": []}
    forms = {"text": ("{:+.3f} ± {:.3f}", 1), "images": ("{:+.1f} ± {:.1f} points", 100)}
    for pair in zip(answers_of("text"), answers_of("images"), strict=True):
        cells = []
        for study, x in zip(clear, pair, strict=True):
            form, unit = forms[study]
            cells += [form.format(unit * x.difference, unit * x.half_width), p_of(x)]
            if x.p < 0.05:
                clear[study].append(label_of(x.variant).replace(", same state", " (same state)"))
        than = pair[0].baseline.replace("nala", "NaLa")
        rows.append([label_of(pair[0].variant), than, *cells])
    assert_has_table(
        markdown(["attention", "minus", "text, loss", "p", "images, accuracy", "p"], rows)
    )
    named = (f"on {study} {', '.join(names) or 'none'}" for study, names in clear.items())
    assert f"Significant after correction: {'; '.join(named)}." in PROSE
    assert shorter_runs() in PROSE
    p_values = {(x.variant, x.baseline): x.p for x in answers_of("text")}
    for name in ("no query norm", "no cosine map, same state", "split"):
        assert p_values[name, "nala"] > 0.05
    assert p_values["softmax, one norm", "softmax"] > 0.05
    for study, steps in (("text", "1,000 steps"), ("images", "500")):
        assert f"{CARDS[study]['config']['task']['steps']:,}" in steps and steps in PROSE


WITHOUT = ", no convolution"


def shorter_runs():
    """The sentence of both pages about the text study, whose differences are significant."""
    clear = {x.variant: -x.difference for x in answers_of("text") if x.p < 0.05}
    bare = {x.variant.removesuffix(WITHOUT): -x.difference for x in answers_of("text-convolution")}
    plain, bare = ([found[name] for name in LABELS] for found in (clear, bare))
    assert min(plain) > 0  # NaLa is behind all three
    return (
        "In runs a third as long, with eight seeds, it is"
        f" {min(plain):.3f} to {max(plain):.3f} nats behind them on text, but level with λ = 1"
        f" instead of 3. Without the block's convolution, it is {min(bare):.2f} to {max(bare):.2f}"
        " behind."
    )


def test_the_power_holds_nala_back_on_text():
    """With λ = 1 it is level with softmax, elu + 1 and ReLU, run with the same seeds."""
    labels = {
        "lam 1": "1 for queries and keys",
        "lam 2": "2 for queries and keys",
        "lam 1 of queries": "1 for queries only",
        "lam 1 of keys": "1 for keys only",
    }
    found = {x.variant: x for x in answers_of("text-powers")}
    rows = [
        [labels[name], f"{x.difference:+.3f} ± {x.half_width:.3f}", p_of(x)]
        for name, x in found.items()
    ]
    assert_has_table(markdown(["λ, instead of 3", "text, loss minus NaLa's", "p"], rows))
    assert results_of("text", "nala") == results_of("text-powers", "nala")  # bit for bit
    assert found["lam 1"].p < 0.05
    others = []
    for name, label in LABELS.items():
        pair = results_of("text-powers", "lam 1"), results_of("text", name)
        middle, half = compare.difference(*pair)
        assert abs(middle) < half, label
        others.append(f"{label} ({middle:+.3f} ± {half:.3f})")
    assert "level with {}, {} and {}.".format(*others) in PROSE


def test_runs_without_the_convolution_agree_with_their_card():
    bare = {x.variant.removesuffix(WITHOUT): x for x in answers_of("text-convolution")}
    kin = {"no query norm": "NaLa without its norm", "split": "NaLa with the sign split"}
    rows = []
    for name, label in {"nala": "NaLa", "lam 1": "NaLa, λ = 1", **kin, **LABELS}.items():
        study = "text-powers" if name == "lam 1" else "text"
        variant = f"{name}{WITHOUT}".removeprefix("nala, ")
        losses = results_of(study, name), results_of("text-convolution", variant)
        cells = [label, *(f"{mean(values):.3f}" for values in losses), "", ""]
        if x := bare.get(name):
            cells[3:] = f"{x.difference:+.3f} ± {x.half_width:.3f}", p_of(x)
        rows.append(cells)
    heading = ["attention", "with the convolution", "without", "without, minus NaLa's", "p"]
    assert_has_table(markdown(heading, rows))
    for name, x in bare.items():  # NaLa is last
        assert (x.p > 0.05) if name in kin else (x.difference < 0 and x.p < 0.05)
    losses = {name: results_of("text-convolution", name + WITHOUT) for name in bare}
    softmax, one = losses.pop("softmax"), losses["lam 1"]
    for theirs in losses.values():  # softmax is ahead of every linear attention
        middle, half = compare.difference(softmax, theirs)
        assert middle < -half
    elu, relu = (compare.difference(one, losses[name]) for name in ("elu", "relu"))
    assert all(abs(middle) < half for middle, half in (elu, relu))
    sentence = "level with elu + 1 ({:+.3f} ± {:.3f}) and ReLU ({:+.3f} ± {:.3f})"
    assert sentence.format(*elu, *relu) in PROSE
    assert 0.4 < bare["lam 1"].difference / bare["softmax"].difference < 0.6  # "about half"


def test_earlier_studies_agree_with_their_cards():
    """Their code is gone; their findings stay, each in a sentence."""
    loss, points = "{:+.3f} ± {:.3f}", "{:+.1f} ± {:.1f} points"
    gate = {
        name: compare.difference(results_of("text-gate", without), results_of("text", name))
        for name, without in {"nala": "no gate", "softmax": "softmax, no gate"}.items()
    }
    assert all(middle < -half for middle, half in gate.values())
    pairs = tuple((name, "nala") for name in ("lam 1", "lam 2"))
    assert min(x.p for x in answers_of("images-powers", pairs)) > 0.05
    images = {
        name: [100 * x for x in difference_of("images-powers", name)] for name in ("lam 1", "lam 2")
    }
    for sentence in (
        f"Loss minus NaLa's: softmax {shown('text-long', 'softmax', loss)},"
        f" elu + 1 {shown('text-long', 'elu', loss)}, λ = 1 {shown('text-long', 'lam 1', loss)}.",
        "its loss minus NaLa's is"
        f" {shown('text-gate', 'softmax, no gate', loss, 'no gate')}. In runs this short, both are"
        f" even better without a gate (NaLa {loss.format(*gate['nala'])}, softmax"
        f" {loss.format(*gate['softmax'])})",
        f"λ = 1 changes the accuracy by {points.format(*images['lam 1'])}, λ = 2 by"
        f" {points.format(*images['lam 2'])}.",
    ):
        assert sentence in PROSE, sentence


def test_other_learning_rates_agree_with_their_cards():
    """None is significantly better, and the best of the three means gains little."""
    ahead, gains = [], {"text": [], "images": []}
    for study, sign in (("text", -1), ("images", 1)):
        card = f"{study}-rates"
        for name in ATTENTIONS:
            usual = sign * mean(results_of(card, name))
            for factor in ("half", "double"):
                other = f"{name}, {factor} rates"
                gains[study].append(sign * mean(results_of(card, other)) - usual)
                middle, half = difference_of(card, other, baseline=name)
                assert sign * middle < half, (study, other)
            middle, half = difference_of(card, name) if name != "nala" else (0, 0)
            if abs(middle) > half:
                ahead.append(f"{LABELS[name]} on {study} ({middle:+.3f} ± {half:.3f})")
    assert (
        "Significantly better with other rates: none. The best of the three means is never more"
        f" than {max(gains['text']):.3f} nats or {100 * max(gains['images']):.1f} points better"
        " than with the rates as used. Significantly different from NaLa as used, in these short"
        f" runs: {', '.join(ahead)}."
    ) in PROSE
    for study, steps in (("text-rates", "1,200 steps"), ("images-rates", "900")):
        assert f"{CARDS[study]['config']['task']['steps']:,}" in steps and steps in PROSE


# --- The premise in trained models ----------------------------------------------------------------

PREMISE = {study: read(f"premise_{study}") for study in ("text", "images")}


def correlation(study, attention, norm):
    """Mean correlation over seeds and blocks, then the lowest and the highest mean of a block."""
    rows = [row for row in PREMISE[study]["results"]["correlations"] if row["variant"] == attention]
    blocks = sorted({row["block"] for row in rows})
    means = [mean(row[norm] for row in rows if row["block"] == block) for block in blocks]
    return mean(means), min(means), max(means)


def test_the_premise_in_trained_models_agrees_with_its_cards():
    norms = {"query_norm": "query's norm", "key_norm": "key's norm"}
    shown = [(study, norm) for study in PREMISE for norm in norms]
    rows = [
        [f"`{name}`", *("{:+.2f} ({:+.2f} to {:+.2f})".format(*correlation(x, name, norm))
                        for x, norm in shown)]
        for name in ATTENTIONS
    ]  # fmt: skip
    heading = ["attention", *(f"{study}, {norms[norm]}" for study, norm in shown)]
    assert_has_table(markdown(heading, rows))
    for study, card in PREMISE.items():
        assert card["config"]["seeds"] == CARDS[study]["config"]["seeds"]
    rows = PREMISE["text"]["results"]["correlations"]
    softmax = [row for row in rows if row["variant"] == "softmax"]
    assert max(row["query_norm"] for row in softmax) < -0.8  # every block, every seed
    assert abs(correlation("text", "softmax", "key_norm")[0]) < 0.2
    assert all(abs(correlation("text", name, "query_norm")[0]) < 0.2 for name in ("nala", "elu"))


# --- Speed ----------------------------------------------------------------------------------------

SPEED, EPYC, LONG = (read(f"speed_cpu_{x}")["results"] for x in ("float32", "epyc", "long"))
PEERS = read("speed_cpu_peers")["results"]["peers"]
BOTH_PASSES = {"pass": "forward + backward"}
LONG_RUNS = {
    window: {x: read(f"shakespeare_cpu_{x}_block{window}") for x in ("nala", "softmax")}
    for window in (4096, 8192)
}


def ratio(rows, slow, fast, what="median", **which):
    """slow's time, or memory, divided by fast's: two forms, or two contexts of one form."""
    numbers = [bench.select(rows, **which, **one)[0][what] for one in (slow, fast)]
    return numbers[0] / numbers[1]


def form_ratio(rows, slow, fast, what="median", **which):
    return ratio(rows, {"form": slow}, {"form": fast}, what, **which)


def speedup(length, form="nala", causal=True, results=SPEED):
    case = {"length": length, "causal": causal, **BOTH_PASSES}
    return form_ratio(results["attention"], "softmax", form, **case)


def format_ratio(number):
    return f"{number:.2f}" if number < 10 else f"{number:.1f}"


def cells(heading):
    """The two-column table with this heading on the page, as a dict."""
    (table,) = re.findall(rf"^\| {heading} \|\n\|---\|---\|\n((?:\|.+\n)+)", PAGE, re.MULTILINE)
    return dict(line.strip("| ").split(" | ") for line in table.strip().splitlines())


def test_softmax_s_relative_times_agree_with_the_run_cards():
    lengths = (64, 256, 1024, 4096, 16384, 65536)
    forms = {
        "causal": ("nala", True),
        "causal, sign split": ("split", True),
        "causal, compiled": ("compiled", True),
        "bidirectional": ("nala", False),
        "bidirectional, compiled": ("compiled", False),
        "causal, on an AMD EPYC": ("nala", True, EPYC),
    }
    rows = [
        [name, *(format_ratio(speedup(n, *form)) for n in lengths)] for name, form in forms.items()
    ]
    assert_has_table(markdown(["softmax's time ÷ NaLa's", *(f"{n:,}" for n in lengths)], rows))


def time_ratio(window):
    """Time of a whole run with softmax, divided by NaLa's."""
    runs = LONG_RUNS[window]
    return runs["softmax"]["seconds"] / runs["nala"]["seconds"]


def test_whole_runs_with_long_windows_agree_with_their_cards():
    rows = []
    for window, runs in LONG_RUNS.items():
        ours, theirs = (run["config"] | {"attention": ""} for run in runs.values())
        assert ours == theirs and (ours["block"], ours["batch"]) == (window, 1)
        assert {run["hardware"]["threads"] for run in runs.values()} == {2}
        losses = [run["results"]["validation_loss"] for run in runs.values()]
        assert max(losses) - min(losses) < 0.01  # "about the same"
        minutes = [run["seconds"] / 60 for run in runs.values()]
        shown = [f"{x:.3f} after {y:.1f} min" for x, y in zip(losses, minutes, strict=True)]
        rows.append([f"{window:,}", str(ours["steps"]), *shown, f"{time_ratio(window):.1f}"])
    heading = ["windows of", "steps", "NaLa", "softmax", "time, softmax's ÷ NaLa's"]
    assert_has_table(markdown(heading, rows))


def test_the_other_speed_measurements_agree_with_the_run_cards():
    decode = partial(ratio, SPEED["decode"])
    after = partial(form_ratio, SPEED["decode"], fast="nala", context=16384)
    case = {"length": 16384, "causal": True, **BOTH_PASSES}
    steps = ["; ".join(f"{form_ratio(SPEED['steps'], form, 'softmax', block=256):.3f}"
                       for form in ("nala", "elu"))]  # fmt: skip
    held = {row["form"]: row["peak"] / 2**20 for row in LONG["long"]}
    assert list(cells(r"\| measured").values()) == [
        f"{SPEED['crossover']['causal, forward + backward']:,};"
        f" compiled {bench.crossover(SPEED['attention'], 'compiled'):,}",
        f"{form_ratio(SPEED['attention'], 'nala', 'softmax', 'peak', **case):.2f}",
        f"{decode({'context': 16384}, {'context': 64}, form='nala'):.2f}",
        f"{after(slow='softmax_grown'):.1f}",
        f"{after(slow='softmax'):.1f}",
        *steps,
        f"{form_ratio(LONG['steps'], 'softmax', 'nala', block=16384):.2f}",
        f"{form_ratio(LONG['long'], 'softmax', 'nala'):.0f}",
        f"{held['nala']:.0f}; {held['softmax']:.0f}; {held['written out']:,.0f} MiB",
    ]
    share = form_ratio(SPEED["attention"], "product", "nala", **case | {"length": 4096})
    assert f"alone takes {share:.0%} at 4,096 tokens" in PROSE
    rows = read("speed_cpu_segments")["results"]["segments"]
    ratios = [
        form_ratio(rows, f"2^{i}", "2^17", causal=x) for x in (True, False) for i in range(15, 20)
    ]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times as long as 2^17" in PROSE
    ranges = []
    for form in ("softmax", "nala"):
        which = {"form": form, "causal": True, **BOTH_PASSES}
        ours, epyc = (bench.select(card["attention"], **which)[4:] for card in (SPEED, EPYC))
        ratios = [a["median"] / b["median"] for a, b in zip(ours, epyc, strict=True)]
        ranges.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
    assert "softmax takes {} times as long as on the EPYC, NaLa {}.".format(*ranges) in PROSE


def test_the_times_of_other_libraries_agree_with_the_run_card():
    expected = []
    for form in ("fla_naive_chunk", "fast_transformers", "performer_pytorch"):
        lengths = (2**i for i in range(10, 15))
        ratios = [form_ratio(PEERS, form, "nala", length=n, **BOTH_PASSES) for n in lengths]
        expected.append(f"{min(ratios):.3f} to {max(ratios):.3f}")
    assert list(cells(r"library \| time ÷ ours").values()) == expected


def speed_in_short():
    """From how many tokens causal NaLa is faster than the fused softmax, and by how much at 16,384;
    then the gain in training on long windows."""
    crossover = SPEED["crossover"]["causal, forward + backward"]
    assert crossover == EPYC["crossover"]["causal, forward + backward"]
    epyc = format_ratio(speedup(16384, results=EPYC))
    return (
        f"from {crossover:,} tokens",
        f"at 16,384 it is {format_ratio(speedup(16384))} times as fast ({epyc} on an AMD EPYC)."
        f" On windows of 8,192 characters it trains {time_ratio(8192):.1f} times as fast, to"
        " about the same loss",
    )


def test_speed_in_short():
    for length in (16384, 32768, 65536):
        which = {"length": length, "causal": True, **BOTH_PASSES}
        assert form_ratio(SPEED["attention"], "nala", "softmax", "peak", **which) <= 2
    assert "at most twice its memory from 16,384 tokens" in PROSE
    assert f"Causal NaLa is faster than the fused softmax {speed_in_short()[0]}" in PROSE


def test_the_commands_for_a_gpu_are_accepted():
    programs = {
        "train_shakespeare.py": train_shakespeare,
        "train_cifar.py": train_cifar,
        "nala_min.lab.bench": bench,
        "nala_min.lab.compare": compare,
    }
    (commands,) = re.findall(r"```bash\n(.+?)```", PAGE[PAGE.index("## On a GPU") :], re.DOTALL)
    assert len(commands.splitlines()) == 7
    for line in commands.splitlines():
        name, *flags = [word for word in shlex.split(line)[1:] if word != "-m"]
        assert parse_flags(programs[name].Settings, flags).device == "cuda"


# --- Faults and mutants ---------------------------------------------------------------------------


def test_the_table_of_faults_agrees_with_its_run_card():
    results = read("faults")["results"]
    (rows,) = re.findall(r"^\| fault \|.+\n\|---.+\n((?:\|.+\n)+)", PAGE, re.MULTILINE)
    assert rows.strip() == faults.table(results)
    assert len(rows.strip().splitlines()) == len(faults.ROWS)
    assert all(row.endswith("| nothing |") for row in rows.strip().splitlines())
    assert results["compare"]["ended study"]["left"] == 0
    for script in faults.SCRIPTS:
        kills = results[script]["kill -9"]
        assert kills["times"] >= 20 and min(kills["phases"].values()) >= 5


def test_the_mutation_score_agrees_with_its_run_card():
    card = read("mutation")
    results = card["results"]
    survivors, equivalent = len(results["survivors"]), len(results["equivalent"])
    assert results["mutants"] == results["caught"] + survivors + equivalent
    share = results["caught"] / (results["caught"] + survivors)
    assert share >= 0.95 and card["config"]["every"] == 2
    sentence = (
        f"Of {results['mutants']} mutants, every second one that it makes, {equivalent} appear"
        f" equivalent to the original; the tests caught {results['caught']} of the other"
        f" {results['caught'] + survivors} ("
    )
    assert sentence in PROSE
