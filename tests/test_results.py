"""notebooks/results/README.md: every number, table and verdict is that of the run cards."""

import re
from functools import partial
from statistics import mean
from typing import NamedTuple

import faults
import pytest

from nala_min import runcard
from nala_min.lab import bench, compare
from nala_min.lab.studies import STUDIES, VARIANTS

PAGE = (runcard.RESULTS / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(PAGE.split()).replace(" %", "%")
ATTENTIONS = ("nala", "softmax", "elu", "relu")
LABELS = {"softmax": "softmax", "elu": "elu + 1", "relu": "ReLU"}


class Table(NamedTuple):
    """Of the runs of a script's default recipe with four attentions."""

    result: str  # in the cards
    heading: str  # what the page calls it
    form: str  # of a number
    away: str  # form of a difference, times unit, and half its interval
    unit: int
    better: int  # 1: more is better; -1: less
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
tables = pytest.mark.parametrize("task", TABLES)


def cards(task, attention):
    """The committed cards of a task's default run with another attention, by seed."""
    paths = runcard.RESULTS.glob(f"{task}_cpu_{attention}_seed*.json")
    return sorted((runcard.read_json(path) for path in paths), key=lambda c: c["config"]["seed"])


def reached(task, attention):
    return [card["results"][TABLES[task].result] for card in cards(task, attention)]


def default(task):
    return runcard.read_json(runcard.RESULTS / f"{task}_cpu_default.json")


def results_table(task):
    """The page's table of a task: every attention's mean, range and difference from NaLa's."""
    table = TABLES[task]
    lines = [
        f"| attention, {table.heading} | mean | lowest to highest | minus NaLa's |",
        "|---|---|---|---|",
    ]
    for name in ATTENTIONS:
        values, away = reached(task, name), ""
        if name != "nala":
            both = compare.difference(values, reached(task, "nala"))
            away = table.away.format(*(table.unit * number for number in both))
        low, middle, high = map(table.form.format, (min(values), mean(values), max(values)))
        lines.append(f"| `{name}` | **{middle}** | {low} to {high} | {away} |")
    return "\n".join(lines).replace("%", " %")


def verdict(task):
    """What a task's 95 % intervals say of NaLa and the others, in the words of both pages."""
    groups = {"ahead of": [], "behind": [], "level with": []}
    for name, label in LABELS.items():
        away, half = compare.difference(reached(task, name), reached(task, "nala"))
        lead = -away * TABLES[task].better
        group = "level with" if abs(lead) < half else "ahead of" if lead > 0 else "behind"
        groups[group].append(label)
    listed = {group: " and ".join(", ".join(x).rsplit(", ", 1)) for group, x in groups.items() if x}
    return ", ".join(f"{group} {names}" for group, names in listed.items())


def small_tasks():
    """What both pages say of text and images."""
    text, images = verdict("shakespeare"), verdict("cifar")
    if text == images:
        return f"On Shakespeare and on CIFAR-10, NaLa is {text}."
    return f"On Shakespeare, NaLa is {text}; on CIFAR-10, it is {images}."


@tables
def test_results_table_is_the_run_cards(task):
    assert f"\n\n{results_table(task)}\n\n" in PAGE
    assert {len(cards(task, name)) for name in ATTENTIONS} == {5}


def test_what_the_page_says_of_the_tables_is_what_their_intervals_say():
    assert small_tasks() in PROSE
    text, images = (PROSE.index(f"## {name}") for name in ("Text", "Images"))
    sections = {"shakespeare": PROSE[text:images], "cifar": PROSE[images:]}
    for task, section in sections.items():
        assert section.count(f" NaLa is {verdict(task)}. ") == 1


@pytest.mark.parametrize(
    ("task", "command"),
    [
        ("shakespeare", "python train_shakespeare.py"),
        ("cifar", "python train_cifar.py --data-dir ."),
    ],
)
def test_the_default_run_is_its_run_card(task, command):
    card, form = default(task), TABLES[task].form
    assert card["command"] == command
    number = form.format(card["results"][TABLES[task].result])
    assert f"reached {number} after {card['seconds']:.0f} s of training" in PROSE
    assert card["config"] == cards(task, "nala")[0]["config"]
    assert card["seconds"] < 300
    assert f"({card['results']['parameters'] / 1e6:.2f} M parameters)" in PROSE


@tables
def test_the_runs_of_a_table_differ_in_attention_and_seed_only(task):
    everything = [card for name in ATTENTIONS for card in cards(task, name)]
    for key in ("data", "versions"):
        assert all(card[key] == everything[0][key] for card in everything), key
    same = {"attention": "", "seed": 0}
    assert all(card["config"] | same == everything[0]["config"] | same for card in everything)
    runs = [(card["config"]["attention"], card["config"]["seed"]) for card in everything]
    assert len(set(runs)) == len(runs)
    assert len({card["results"]["parameters"] for card in everything}) == 1
    assert {card["hardware"]["threads"] for card in everything} == {1}
    assert everything[0]["data"]["name"] == TABLES[task].data


# --- When does it help? ---------------------------------------------------------------------------

NOT_MEASURED = {"text-gpu"}
MEASURED = [name for name in STUDIES if name not in NOT_MEASURED]
CARDS = {name: runcard.read_json(runcard.RESULTS / f"compare_{name}.json") for name in MEASURED}
STUDIED = {name: card["results"]["runs"] for name, card in CARDS.items()}


def found(study, variant, result=None):
    return compare.values(STUDIED[study], variant, result or STUDIES[study].task.result)


def away(study, variant, than="nala"):
    """Mean difference of variant's result from another's, and half its 95 % interval."""
    return compare.difference(found(study, variant), found(study, than))


def said(study, variant, form="{:+.2f} ± {:.2f}"):
    return form.format(*away(study, variant))


def evidence():
    """What stands in the page's text for each of these marks."""
    norms = {kind: found("sharpness", "nala", f"norm of {kind}") for kind in ("one", "many")}
    minutes = sum(CARDS[name]["seconds"] for name in compare.DEFAULT_STUDIES) / 2 / 60
    return {
        "@A1@": said("sharpness", "no query norm").lstrip("+"),
        "@A2@": said("recall", "no cosine map, same state").lstrip("-"),
        "@A3@": said("recall", "no query norm"),
        "@L1@": said("recall", "lam 1"),
        "@L2@": said("recall", "lam 2", "{:+.3f} ± {:.3f}"),
        "@R@": "λ = 2 recalls {:+.2f} ± {:.2f} more (p = {:.3f})".format(
            *answered("recall-powers")[0][2:]
        ),
        "@W@": f"one of its runs falls to {min(found('recall-powers', 'lam 2')):.2f}",
        "@Q5@": said("recall", "q and k 5 times as large"),
        "@P@": "λ = 1 for keys only, recall changes by {}, for queries only by {}".format(
            *(said("recall", f"lam 1 of {name}") for name in ("keys", "queries"))
        ),
        "@D@": "4 channels recall {:.2f}, four of 8 as much as two of 16 ({:.2f}), one of 32 less"
        " again ({:.2f})".format(*(mean(found("recall", f"nala, D = {n}")) for n in (4, 8, 32))),
        "@T@": "heads of 4 channels recall {:+.2f} ± {:.2f} more".format(
            *away("recall", "no query norm, D = 4", than="nala, D = 4")
        ),
        "@N1@": f"{min(norms['one']):.1f} to {max(norms['one']):.1f}",
        "@N2@": f"{min(norms['many']):.2f} to {max(norms['many']):.2f}",
        "@H@": f"{minutes:.0f} minutes",
        "@I@": f"`--study images` another {CARDS['images']['seconds'] / 2 / 60:.0f} minutes",
    }


MAIN = (
    *("nala", "softmax", "elu", "elu, same state", "relu", "relu, same state", "no query norm"),
    "no cosine map, same state",
)


# The table's columns: study, heading, result and how to write it.
COLUMNS = {
    "recall": ("recall ↑", "accuracy at 64 pairs", "{:.2f}"),
    "sharpness": ("one or its group ↓", "error", "{:.3f}"),
    "sharpness-all": ("one or all ↓", "error", "{:.3f}"),
    "text": ("text ↓", "validation loss", "{:.3f}"),
    "images": ("images ↑", "test accuracy", "{:.3f}"),
}


def studies_table(main):
    """The page's table of MAIN, or of all other variants: the mean result in each study, with the
    lowest and highest in brackets."""
    tried = {row["variant"] for name in COLUMNS for row in STUDIED[name]}
    rest = [name for name in VARIANTS if name in tried and name not in MAIN]
    heading = ["attention", *(heading for heading, *_ in COLUMNS.values())]
    lines = [heading, ["---"] * len(heading)]
    for name in MAIN if main else rest:
        cells = []
        for study, (_, result, form) in COLUMNS.items():
            found = compare.values(STUDIED[study], name, result)
            shown = [form.format(f(found)) for f in (mean, min, max)] if found else []
            cells.append("{} ({} to {})".format(*shown) if found else "")
        lines.append([f"`{name}`", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


ANSWERED = {"text": ("{:+.3f} ± {:.3f}", 1), "images": ("{:+.1f} ± {:.1f} points", 100)}
CALLED = {
    "softmax": "softmax",
    "elu": "elu + 1",
    "relu": "ReLU",
    "split": "sign split",
    "no query norm": "NaLa without its norm",
    "no cosine map": "NaLa with ReLU for its cosines",
    "one norm": "softmax with one norm",
}


def called(variant):
    """A variant in the words of the page."""
    first, *rest = variant.removeprefix("softmax, ").split(", ")
    return ", ".join([CALLED[first], *rest])


def answered(study):
    return compare.answers(STUDIED[study], STUDIES[study])


def p_of(answer):
    return "< 0.001" if answer.p < 0.001 else f"{answer.p:.3f}"


def answers_table():
    """The page's table of what text and images were asked, with corrected p-values."""
    lines = [
        "| attention | minus | text, loss | p | images, accuracy | p |",
        "|---|---|---|---|---|---|",
    ]
    for text, images in zip(*map(answered, ANSWERED), strict=True):
        cells = []
        for answer, (form, unit) in zip((text, images), ANSWERED.values(), strict=True):
            cells += [form.format(unit * answer.difference, unit * answer.half_width), p_of(answer)]
        than = {"nala": "NaLa"}.get(text.baseline, text.baseline)
        lines.append(f"| {called(text.variant)} | {than} | {' | '.join(cells)} |")
    return "\n".join(lines)


def powers_table():
    """The page's table of NaLa with smaller powers, on text."""
    called = {
        "lam 1": "1 for queries and keys",
        "lam 2": "2 for queries and keys",
        "lam 1 of queries": "1 for queries only",
        "lam 1 of keys": "1 for keys only",
    }
    lines = ["| λ, instead of 3 | text, loss minus NaLa's | p |", "|---|---|---|"]
    for x in answered("text-powers"):
        lines.append(
            f"| {called[x.variant]} | {x.difference:+.3f} ± {x.half_width:.3f} | {p_of(x)} |"
        )
    return "\n".join(lines)


WITHOUT = ", no convolution"
OTHERS = {"no query norm": "NaLa without its norm", "split": "NaLa with the sign split"}


def convolution_table():
    """The page's table of text with and without the convolution."""
    lines = [
        "| attention | with the convolution | without | without, minus NaLa's | p |",
        "|---|---|---|---|---|",
    ]
    answers = {x.variant: x for x in answered("text-convolution")}
    for name, label in {"nala": "NaLa", "lam 1": "NaLa, λ = 1", **OTHERS, **LABELS}.items():
        variant = f"{name}{WITHOUT}".removeprefix("nala, ")
        study = "text-powers" if name == "lam 1" else "text"
        losses = [mean(found(study, name)), mean(found("text-convolution", variant))]
        cells = [label, *(f"{loss:.3f}" for loss in losses), "", ""]
        if variant in answers:
            x = answers[variant]
            cells[3:] = f"{x.difference:+.3f} ± {x.half_width:.3f}", p_of(x)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


ELSEWHERE = {  # the study and what it changes, how to write its differences, and in what unit
    "text-long": ("windows of 1,024 characters", "{:+.3f} ± {:.3f}", 1),
    "text-gate": ("no gate", "{:+.3f} ± {:.3f}", 1),
    "images-powers": ("images", "{:+.1f} ± {:.1f} points", 100),
}


def elsewhere_table():
    """The page's table of longer windows, of blocks without a gate and of powers on images."""
    lines = ["| what is different | attention | minus NaLa's | p |", "|---|---|---|---|"]
    named = {"lam 1": "NaLa, λ = 1", "lam 2": "NaLa, λ = 2", **LABELS}
    for study, (change, form, unit) in ELSEWHERE.items():
        for x in answered(study):
            label, away = (
                named[x.variant.split(", ")[0]],
                form.format(unit * x.difference, unit * x.half_width),
            )
            lines.append(f"| {change} | {label} | {away} | {p_of(x)} |")
    return "\n".join(lines)


def answers_verdict():
    """Which answers are significant, as a family."""
    parts = []
    for study in ANSWERED:
        clear = [called(x.variant) for x in answered(study) if x.p < 0.05]
        clear = [re.sub(", (same state)", r" (\1)", name) for name in clear]
        parts.append(f"on {study} {', '.join(clear) or 'none'}")
    return f"Significant after correction: {'; '.join(parts)}."


def shorter_runs():
    """What both pages say of the study of text: it is clear, and the longer runs are not."""
    clear = {
        x.variant: x.difference for x in answered("text") if x.p < 0.05 and x.baseline == "nala"
    }
    plain = [-clear[name] for name in LABELS]
    assert min(plain) > 0  # NaLa is behind all three
    bare = {x.variant.removesuffix(WITHOUT): -x.difference for x in answered("text-convolution")}
    bare = [bare[name] for name in LABELS]
    return (
        "In runs a third as long, with eight seeds, it is"
        f" {min(plain):.3f} to {max(plain):.3f} nats behind them on text, but level with λ = 1"
        f" instead of 3. Without the block's convolution, it is {min(bare):.2f} to {max(bare):.2f}"
        " behind."
    )


PREMISE = {
    study: runcard.read_json(runcard.RESULTS / f"premise_{study}.json")
    for study in ("text", "images")
}


def premise_table():
    """The page's table: rank correlation of entropy with norms, mean over seeds and blocks, with
    the lowest and the highest of the blocks' means."""
    norms = {"query_norm": "query's norm", "key_norm": "key's norm"}
    heading = [f"{study}, {name}" for study in PREMISE for name in norms.values()]
    lines = [["attention", *heading], ["---"] * 5]
    for name in ATTENTIONS:
        cells = [
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*correlation(study, name, norm))
            for study in PREMISE
            for norm in norms
        ]
        lines.append([f"`{name}`", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def correlation(study, attention, norm):
    """Its mean over seeds and blocks, and the lowest and the highest mean of a block."""
    rows = [row for row in PREMISE[study]["results"]["correlations"] if row["variant"] == attention]
    blocks = sorted({row["block"] for row in rows})
    means = [mean(row[norm] for row in rows if row["block"] == block) for block in blocks]
    return mean(means), min(means), max(means)


FACTORS = {"half": ", half rates", "as used": "", "double": ", double rates"}
RATES = {"text-rates": ("text", "{:.3f}", -1), "images-rates": ("images", "{:.3f}", 1)}


def rates_table():
    """The page's table of results with half, the same and double the learning rates."""
    shown = [(study, factor) for study in RATES for factor in FACTORS]
    lines = [
        ["attention", *(f"{RATES[study][0]}, {factor}" for study, factor in shown)],
        ["---"] * (1 + len(shown)),
    ]
    for name in ATTENTIONS:
        cells = (mean(found(study, name + FACTORS[factor])) for study, factor in shown)
        forms = (RATES[study][1] for study, _ in shown)
        lines.append([f"`{name}`", *(f.format(x) for f, x in zip(forms, cells, strict=True))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rates_verdict():
    """Which attentions are significantly better with other rates, and what the best rates of each
    would change."""
    better, gains = [], []
    for study, (_, _, sign) in RATES.items():
        for name in ATTENTIONS:
            means = {f: sign * mean(found(study, name + end)) for f, end in FACTORS.items()}
            gains.append((study, max(means.values()) - means["as used"]))
            for factor in ("half", "double"):
                middle, half = away(study, name + FACTORS[factor], than=name)
                if sign * middle > half:
                    better.append(f"{LABELS.get(name, 'NaLa')} with {factor} on {RATES[study][0]}")
    most = {study: max(gain for s, gain in gains if s == study) for study in RATES}
    ahead = [
        f"{LABELS[name]} on {RATES[study][0]} ({said(study, name, '{:+.3f} ± {:.3f}')})"
        for study in RATES
        for name in ATTENTIONS[1:]
        if abs(away(study, name)[0]) > away(study, name)[1]
    ]
    return (
        f"Significantly better with other rates: {', '.join(better) or 'none'}. The best of the"
        f" three means is never more than {most['text-rates']:.3f} nats or"
        f" {100 * most['images-rates']:.1f} points better than with the rates as used."
        " Significantly different from NaLa as used, in these short runs:"
        f" {', '.join(ahead) or 'none'}."
    )


def test_other_learning_rates_are_their_cards():
    assert f"\n\n{rates_table()}\n\n" in PAGE
    assert rates_verdict() in PROSE
    for study, steps in (("text-rates", "1,200 steps"), ("images-rates", "900")):
        assert f"{STUDIES[study].task.steps:,}" in steps and steps in PROSE


def test_the_tables_of_studies_are_their_cards():
    for main in (True, False):
        assert f"\n\n{studies_table(main)}\n\n" in PAGE
    for mark, text in evidence().items():
        assert text in PROSE, mark


def test_the_default_studies_fit_two_hours_on_two_cores():
    assert sum(CARDS[name]["seconds"] for name in compare.DEFAULT_STUDIES) / 2 < 7200


@pytest.mark.parametrize("study", CARDS)
def test_a_study_s_card_is_of_the_study_as_it_is(study):
    card, now = CARDS[study], STUDIES[study]
    runs = [(row["variant"], row["seed"]) for row in card["results"]["runs"]]
    assert runs == [(v, seed) for seed in range(1, now.seeds + 1) for v in now.variants]
    assert card["config"]["variants"] == list(now.variants)
    task = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(now.task).items()}
    later = {
        "weight_decay": 0.1,
        "schedule": "cosine",
        "held_out": False,
    }  # was so before it said so
    same = later | card["config"]["task"]
    assert same == later | {k: v for k, v in task.items() if k not in ("file", "folder")}
    command = card["command"].replace("nala_min.compare", "nala_min.lab.compare")  # before lab/
    assert command == f"python -m nala_min.lab.compare --study {study}"


def test_what_the_readme_concludes_is_in_the_cards():
    """1: ahead of elu + 1 and ReLU with states as large, run by run; softmax recalls more."""
    for name in ("elu, same state", "relu, same state"):
        assert min(found("recall", "nala")) > max(found("recall", name))
        assert max(found("sharpness", "nala")) < min(found("sharpness", name))
    assert min(found("recall", "softmax")) == 1 > max(found("recall", "nala"))
    # 3: elu + 1 is no worse where all are to be averaged, ReLU is
    assert mean(found("sharpness-all", "elu, same state")) < mean(found("sharpness-all", "nala"))
    assert min(found("sharpness-all", "relu, same state")) > max(found("sharpness-all", "nala"))
    # The claims: without the norm as bad as ReLU, without the cosine map far less is recalled.
    norm, relu = (mean(found("sharpness", n)) for n in ("no query norm", "relu, same state"))
    assert norm == pytest.approx(relu, abs=0.001)
    for study, name in (("sharpness", "no query norm"), ("recall", "no cosine map, same state")):
        middle, half = away(study, name)
        assert abs(middle) > half
    for study, name in (
        ("sharpness", "no cosine map, same state"),
        ("sharpness", "magnitude-aware, same state"),
        ("recall", "no query norm"),
    ):
        middle, half = away(study, name)
        assert abs(middle) < half
    # What bounds it.
    for study in ("recall", "sharpness", "sharpness-all"):
        sign = 1 if study == "recall" else -1
        for name in STUDIES[study].variants:
            if name[:3] in ("lam", "tau", "alp", "tan"):
                middle, half = away(study, name)
                assert sign * middle < half, (study, name)  # not significantly better
        worse = {"recall": ["lam 1", "lam 1 of keys"], "sharpness": ["alpha 2", "lam 1"]}
        for name in worse.get(study, ["alpha 2"]):
            middle, half = away(study, name)
            assert sign * middle < -half  # significantly worse
    middle, half = away("recall", "q and k 5 times as large")
    assert abs(middle) < half


def test_the_answers_of_text_and_images_are_their_cards():
    """Neither the norm nor the cosine map is why NaLa is behind; softmax does without the norm."""
    assert f"\n\n{answers_table()}\n\n" in PAGE
    assert answers_verdict() in PROSE and shorter_runs() in PROSE
    p_values = {(x.variant, x.baseline): x.p for x in answered("text")}
    for name in ("no query norm", "no cosine map, same state", "split"):
        assert p_values[name, "nala"] > 0.05
    assert p_values["softmax, one norm", "softmax"] > 0.05
    for study, steps in (("text", "1,000 steps"), ("images", "500")):
        assert f"{STUDIES[study].task.steps:,}" in steps and steps in PROSE


def test_it_is_the_power_that_holds_nala_back_on_text():
    """With λ = 1 it is level with softmax, elu + 1 and ReLU, whose runs are of the same seeds."""
    assert f"\n\n{powers_table()}\n\n" in PAGE
    assert found("text", "nala") == found("text-powers", "nala")  # to the last digit
    p_values = {x.variant: x.p for x in answered("text-powers")}
    assert p_values["lam 1"] < 0.05
    recalled = [f"{mean(found('recall', name)):.0%}" for name in ("lam 1", "nala")]
    assert "recalls {} of 64 values instead of {}".format(*recalled) in PROSE
    others = {}
    for name, label in LABELS.items():
        others[label] = compare.difference(found("text-powers", "lam 1"), found("text", name))
        assert abs(others[label][0]) < others[label][1], label
    said = [f"{label} ({x:+.3f} ± {half:.3f})" for label, (x, half) in others.items()]
    assert "level with {}, {} and {}.".format(*said) in PROSE


def test_what_the_convolution_hides_is_its_card():
    assert f"\n\n{convolution_table()}\n\n" in PAGE
    bare = {x.variant.removesuffix(WITHOUT): x for x in answered("text-convolution")}
    for name, x in bare.items():  # NaLa is last
        assert (x.p > 0.05) if name in OTHERS else (x.difference < 0 and x.p < 0.05)
    losses = {name: found("text-convolution", name + WITHOUT) for name in bare}
    softmax, one = losses.pop("softmax"), losses["lam 1"]
    for theirs in losses.values():  # softmax is ahead of every linear attention
        middle, half = compare.difference(softmax, theirs)
        assert middle < -half
    elu, relu = (compare.difference(one, losses[name]) for name in ("elu", "relu"))
    assert all(abs(middle) < half for middle, half in (elu, relu))
    said = "level with elu + 1 ({:+.3f} ± {:.3f}) and ReLU ({:+.3f} ± {:.3f})"
    assert said.format(*elu, *relu) in PROSE
    assert 0.4 < bare["lam 1"].difference / bare["softmax"].difference < 0.6  # "about half"


def test_other_settings_are_their_cards():
    """Only without a gate a difference is significant; there, both are better than with it."""
    assert f"\n\n{elsewhere_table()}\n\n" in PAGE
    for study in ELSEWHERE:
        for x in answered(study):
            assert (x.difference > 0) == (study == "images-powers")
            assert (x.p < 0.05) == (study == "text-gate")
    gains = [
        compare.difference(found("text-gate", without), found("text", name))
        for name, without in {"nala": "no gate", "softmax": "softmax, no gate"}.items()
    ]
    assert all(middle < -half for middle, half in gains)
    assert "NaLa {:+.3f} ± {:.3f}, softmax {:+.3f} ± {:.3f}".format(*gains[0], *gains[1]) in PROSE


def test_the_premise_in_trained_models_is_its_cards():
    assert f"\n\n{premise_table()}\n\n" in PAGE
    for study, card in PREMISE.items():
        assert card["config"]["seeds"] == STUDIES[study].seeds
    rows = PREMISE["text"]["results"]["correlations"]
    softmax = [row for row in rows if row["variant"] == "softmax"]
    assert max(row["query_norm"] for row in softmax) < -0.8  # every block, every seed
    assert abs(correlation("text", "softmax", "key_norm")[0]) < 0.2
    assert all(abs(correlation("text", name, "query_norm")[0]) < 0.2 for name in ("nala", "elu"))


def test_the_alternative_texts_of_the_studies_pictures_are_the_cards():
    shares = [
        f"{mean(found('recall', name)):.2f}"
        for name in ("nala", "no query norm", "elu, same state", "no cosine map, same state")
    ]
    assert (
        "NaLa falls to {} at 64 pairs, without the query norm to {}; elu + 1 with an equally large"
        " state to {}; NaLa with ReLU for its cosines, at the same state, to {}".format(*shares)
    ) in PROSE
    errors = [
        f"{mean(found('sharpness', name, f'error of {kind}')):.2f}"
        for name in ("no query norm", "elu, same state")
        for kind in ("one", "many")
    ]
    assert (
        "the query norm lie at {} and {}, elu + 1 with an equally large state at {} and {}".format(
            *errors
        )
    ) in PROSE


# --- Speed ----------------------------------------------------------------------------------------

SPEED = runcard.read_json(runcard.RESULTS / "speed_cpu_float32.json")["results"]
EPYC = runcard.read_json(runcard.RESULTS / "speed_cpu_epyc.json")["results"]
PEERS = runcard.read_json(runcard.RESULTS / "speed_cpu_peers.json")["results"]["peers"]
LONG = runcard.read_json(runcard.RESULTS / "speed_cpu_long.json")["results"]
BOTH = {"pass": "forward + backward"}


def ratio(rows, slow, fast, **which):
    """How many times as long slow takes as fast: two forms, or two contexts of one form."""
    times = [bench.select(rows, **which, **one)[0]["median"] for one in (slow, fast)]
    return times[0] / times[1]


def against_softmax(length, form="nala", causal=True, results=SPEED):
    pair = {"form": "softmax"}, {"form": form}
    return ratio(results["attention"], *pair, length=length, causal=causal, **BOTH)


def short(number):
    return f"{number:.2f}" if number < 10 else f"{number:.1f}"


def test_how_many_times_as_long_softmax_takes_is_the_run_card():
    (table,) = re.findall(r"^\| softmax's time ÷ NaLa's \|.+?\n\n", PAGE, re.MULTILINE | re.DOTALL)
    heading, _, *rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()]
    lengths = [int(cell.replace(",", "")) for cell in heading[1:]]
    forms = {
        "causal": ("nala", True),
        "causal, sign split": ("split", True),
        "causal, compiled": ("compiled", True),
        "bidirectional": ("nala", False),
        "bidirectional, compiled": ("compiled", False),
        "causal, on an AMD EPYC": ("nala", True, EPYC),
    }
    assert [row[0] for row in rows] == list(forms)
    for name, *cells in rows:
        assert cells == [short(against_softmax(n, *forms[name])) for n in lengths], name


def cells(heading):
    """The last column of the page's table of two columns with this heading, by its first."""
    (table,) = re.findall(rf"^\| {heading} \|\n\|---\|---\|\n((?:\|.+\n)+)", PAGE, re.MULTILINE)
    return dict(line.strip("| ").split(" | ") for line in table.strip().splitlines())


def steps_table():
    """The page's table of training steps: what NaLa takes and holds beside softmax."""

    def step(form, what, window):
        return bench.select(LONG["steps"], form=form, block=window)[0][what]

    def over(what, one, other):
        return [short(step(one, what, n) / step(other, what, n)) for n in bench.LONG_WINDOWS]

    def per_second(form):
        sizes = {window: window * batch for window, batch in bench.LONG_WINDOWS.items()}
        return [f"{size / step(form, 'median', n):,.0f}" for n, size in sizes.items()]

    rows = {
        "a training step with windows of": [f"{window:,}" for window in bench.LONG_WINDOWS],
        "---": ["---"] * len(bench.LONG_WINDOWS),
        "time, softmax's ÷ NaLa's": over("median", "softmax", "nala"),
        "time, softmax's ÷ elu + 1's": over("median", "softmax", "elu"),
        "NaLa: characters per second": per_second("nala"),
        "softmax: characters per second": per_second("softmax"),
        "peak memory, NaLa's ÷ softmax's": over("peak", "nala", "softmax"),
    }
    return "\n".join(f"| {' | '.join([name, *cells])} |" for name, cells in rows.items())


LONG_RUNS = {
    window: {
        name: runcard.read_json(runcard.RESULTS / f"shakespeare_cpu_{name}_block{window}.json")
        for name in ("nala", "softmax")
    }
    for window in (4096, 8192)
}


def longer(window):
    """How many times as long a whole run with softmax takes."""
    runs = LONG_RUNS[window]
    return runs["softmax"]["seconds"] / runs["nala"]["seconds"]


def long_runs_table():
    """The page's table of whole runs with long windows."""
    lines = [
        "| windows of | steps | NaLa | softmax | time, softmax's ÷ NaLa's |",
        "|---|---|---|---|---|",
    ]
    for window, runs in LONG_RUNS.items():
        reached = [
            f"{run['results']['validation_loss']:.3f} after {run['seconds'] / 60:.1f} min"
            for run in runs.values()
        ]
        steps = runs["nala"]["config"]["steps"]
        lines.append(f"| {window:,} | {steps} | {' | '.join(reached)} | {longer(window):.1f} |")
    return "\n".join(lines)


def test_whole_runs_with_long_windows_are_their_cards():
    assert f"\n\n{long_runs_table()}\n\n" in PAGE
    for window, runs in LONG_RUNS.items():
        ours, theirs = (run["config"] | {"attention": ""} for run in runs.values())
        assert ours == theirs and (ours["block"], ours["batch"]) == (window, 1)
        assert {run["hardware"]["threads"] for run in runs.values()} == {2}
        losses = [run["results"]["validation_loss"] for run in runs.values()]
        assert max(losses) - min(losses) < 0.01  # "about the same"


def speed_cells():
    """The last column of the page's table of other numbers of speed."""
    step = partial(ratio, SPEED["steps"])
    decode = partial(ratio, SPEED["decode"])
    peaks = [
        bench.select(SPEED["attention"], form=form, length=16384, causal=True, **BOTH)[0]["peak"]
        for form in ("nala", "softmax")
    ]
    place = SPEED["crossover"]["causal, forward + backward"]
    compiled = bench.crossover(SPEED["attention"], form="compiled", causal=True, **BOTH)
    steps = {
        block: "; ".join(
            f"{step({'form': form}, {'form': 'softmax'}, block=block):.3f}"
            for form in ("nala", "elu")
        )
        for block in (256, 64)
    }
    after = {
        form: f"{decode({'form': form}, {'form': 'nala'}, context=16384):.1f}"
        for form in ("softmax_grown", "softmax")
    }
    long = {row["form"]: row for row in LONG["long"]}
    held = [long[form]["peak"] / 2**20 for form in ("nala", "softmax", "written out")]
    return [
        f"{place:,}; compiled {compiled:,}",
        f"{peaks[0] / peaks[1]:.2f}",
        steps[256],
        steps[64],
        f"{decode({'context': 16384}, {'context': 64}, form='nala'):.2f}",
        after["softmax_grown"],
        after["softmax"],
        f"{long['softmax']['median'] / long['nala']['median']:.0f}",
        f"{held[0]:.0f}; {held[1]:.0f}; {held[2]:,.0f} MiB",
    ]


def test_the_other_numbers_of_speed_are_the_run_card():
    assert f"\n\n{steps_table()}\n\n" in PAGE
    assert list(cells(r"\| measured").values()) == speed_cells()


def test_the_times_of_other_libraries_are_the_run_card():
    want = []
    for form in ("fla_naive_chunk", "fast_transformers", "performer_pytorch"):
        found = [
            ratio(PEERS, {"form": form}, {"form": "nala"}, length=2**i, **BOTH)
            for i in range(10, 15)
        ]
        want.append(f"{min(found):.3f} to {max(found):.3f}")
    assert list(cells(r"library \| time ÷ ours").values()) == want
    pair = {"form": "product"}, {"form": "nala"}
    share = ratio(SPEED["attention"], *pair, length=4096, causal=True, **BOTH)
    assert f"alone takes {share:.0%} at 4,096 tokens" in PROSE
    pair, alone = ({"form": "fast_transformers"}, {"form": "nala"}), {"pass": "forward"}
    said = f"alone takes {ratio(PEERS, *pair, length=16384, **alone):.3f} times as long as ours"
    assert f"{said} at 16,384 tokens" in PROSE


def test_the_aims_that_are_missed_and_what_another_machine_takes():
    assert against_softmax(4096) < 5 and against_softmax(16384) < 17
    step = ratio(SPEED["steps"], {"form": "nala"}, {"form": "softmax"}, block=256)
    assert step > 1.2
    assert ratio(SPEED["decode"], {"form": "softmax"}, {"form": "nala"}, context=16384) < 10
    said = []
    for form in ("softmax", "nala"):
        here, there = (
            [
                row["median"]
                for row in bench.select(card["attention"], form=form, causal=True, **BOTH)
                if row["length"] >= 1024
            ]
            for card in (SPEED, EPYC)
        )
        ratios = [a / b for a, b in zip(here, there, strict=True)]
        said.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
    assert "softmax takes {} times as long as on the EPYC, NaLa {}.".format(*said) in PROSE


def speed_in_short():
    """Where causal NaLa passes the fused softmax, and how it and a training step with it stand at
    16,384 tokens."""
    place = SPEED["crossover"]["causal, forward + backward"]
    assert place == EPYC["crossover"]["causal, forward + backward"]
    there = short(against_softmax(16384, results=EPYC))
    return (
        f"from {place:,} tokens",
        f"at 16,384 it is {short(against_softmax(16384))} times as fast ({there} on an AMD EPYC)."
        f" On windows of 8,192 characters it trains {longer(8192):.1f} times as fast, to about the"
        " same loss",
    )


def test_speed_in_short():
    for length in (16384, 32768, 65536):
        which = {"length": length, "causal": True, **BOTH}
        peaks = [
            bench.select(SPEED["attention"], form=form, **which)[0]["peak"]
            for form in ("nala", "softmax")
        ]
        assert peaks[0] <= 2 * peaks[1]
    assert "at most twice its memory from 16,384 tokens" in PROSE
    where = speed_in_short()[0]
    assert f"Causal NaLa is faster than the fused softmax {where}" in PROSE


# --- When something breaks ------------------------------------------------------------------------


def test_what_was_lost_is_the_run_card():
    results = runcard.read_json(runcard.RESULTS / "faults.json")["results"]
    (rows,) = re.findall(r"^\| fault \|.+\n\|---.+\n((?:\|.+\n)+)", PAGE, re.MULTILINE)
    assert rows.strip() == faults.table(results)
    assert len(rows.strip().splitlines()) == len(faults.ROWS)
    assert all(row.endswith("| nothing |") for row in rows.strip().splitlines())
    assert results["compare"]["ended study"]["left"] == 0
    for script in faults.SCRIPTS:
        kills = results[script]["kill -9"]
        assert kills["times"] >= 20 and min(kills["phases"].values()) >= 5


def test_what_mutants_showed_is_the_run_card():
    card = runcard.read_json(runcard.RESULTS / "mutation.json")
    found = card["results"]
    survivors, equivalent = len(found["survivors"]), len(found["equivalent"])
    assert found["mutants"] == found["caught"] + survivors + equivalent
    share = found["caught"] / (found["caught"] + survivors)
    assert share >= 0.95 and card["config"]["every"] == 2
    said = (
        f"Of {found['mutants']} mutants, every second one that it makes, {equivalent} appear"
        f" equivalent to the original; the tests caught {found['caught']} of the others,"
        f" {share:.1%}"
    )
    assert said in PROSE
