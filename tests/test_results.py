"""notebooks/results/README.md: every number, table and verdict agrees with the run cards."""

import re
from functools import partial
from statistics import mean
from typing import NamedTuple

import faults
import pytest

from nala_min import fast, runcard
from nala_min.lab import bench, compare
from nala_min.lab.studies import STUDIES, VARIANTS

PAGE = (runcard.RESULTS / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(PAGE.split()).replace(" %", "%")
ATTENTIONS = ("nala", "softmax", "elu", "relu")
LABELS = {"softmax": "softmax", "elu": "elu + 1", "relu": "ReLU"}


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
tables = pytest.mark.parametrize("task", TABLES)


def cards(task, attention):
    """The committed cards of a task's default run with one attention, sorted by seed."""
    paths = runcard.RESULTS.glob(f"{task}_cpu_{attention}_seed*.json")
    return sorted((runcard.read_json(path) for path in paths), key=lambda c: c["config"]["seed"])


def final_results(task, attention):
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
        values, gap = final_results(task, name), ""
        if name != "nala":
            interval = compare.difference(values, final_results(task, "nala"))
            gap = table.difference.format(*(table.unit * number for number in interval))
        low, middle, high = map(table.form.format, (min(values), mean(values), max(values)))
        lines.append(f"| `{name}` | **{middle}** | {low} to {high} | {gap} |")
    return "\n".join(lines).replace("%", " %")


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


@tables
def test_results_table_agrees_with_the_run_cards(task):
    assert f"\n\n{results_table(task)}\n\n" in PAGE
    assert {len(cards(task, name)) for name in ATTENTIONS} == {5}


def test_the_page_s_verdicts_follow_from_the_intervals():
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
def test_the_default_run_agrees_with_its_run_card(task, command):
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


def results_of(study, variant, result=None):
    return compare.values(STUDIED[study], variant, result or STUDIES[study].task.result)


def difference_of(study, variant, baseline="nala"):
    """Mean difference of variant's result from the baseline's, and the 95 % half-width."""
    return compare.difference(results_of(study, variant), results_of(study, baseline))


def shown_difference(study, variant, form="{:+.2f} ± {:.2f}"):
    return form.format(*difference_of(study, variant))


def evidence():
    """The numbers in the page's text, each under a short name."""
    norms = {kind: results_of("sharpness", "nala", f"norm of {kind}") for kind in ("one", "many")}
    minutes = sum(CARDS[name]["seconds"] for name in compare.DEFAULT_STUDIES) / 2 / 60
    images = CARDS["images"]["seconds"] / 2 / 60
    return {
        "sharpness without the norm": shown_difference("sharpness", "no query norm").lstrip("+"),
        "recall without the cosine map": shown_difference(
            "recall", "no cosine map, same state"
        ).lstrip("-"),
        "recall without the norm": shown_difference("recall", "no query norm"),
        "recall, lam 1": shown_difference("recall", "lam 1"),
        "recall, lam 2": shown_difference("recall", "lam 2", "{:+.3f} ± {:.3f}"),
        "recall, lam 2, more runs": "λ = 2 recalls {:+.2f} ± {:.2f} more (p = {:.3f})".format(
            *answers_of("recall-powers")[0][2:]
        ),
        "worst run": f"one of its runs falls to {min(results_of('recall-powers', 'lam 2')):.2f}",
        "recall, longer queries and keys": shown_difference("recall", "q and k 5 times as large"),
        "recall, lam 1 for one": "λ = 1 for keys only, recall changes by {},"
        " for queries only by {}".format(
            *(shown_difference("recall", f"lam 1 of {name}") for name in ("keys", "queries"))
        ),
        "recall by channels": "4 channels recall {:.2f}, four of 8 as much as two of 16"
        " ({:.2f}), one of 32 less again ({:.2f})".format(
            *(mean(results_of("recall", f"nala, D = {n}")) for n in (4, 8, 32))
        ),
        "recall, heads of 4": "heads of 4 channels recall {:+.2f} ± {:.2f} more".format(
            *difference_of("recall", "no query norm, D = 4", baseline="nala, D = 4")
        ),
        "norms, one key": f"{min(norms['one']):.1f} to {max(norms['one']):.1f}",
        "norms, many keys": f"{min(norms['many']):.2f} to {max(norms['many']):.2f}",
        "time of the default studies": f"{minutes:.0f} minutes",
        "time of the images study": f"`--study images` another {images:.0f} minutes",
    }


MAIN = (
    *("nala", "softmax", "elu", "elu, same state", "relu", "relu, same state", "no query norm"),
    "no cosine map, same state",
)


# Columns of the table: {study: (heading, result, format)}.
COLUMNS = {
    "recall": ("recall ↑", "accuracy at 64 pairs", "{:.2f}"),
    "sharpness": ("one or its group ↓", "error", "{:.3f}"),
    "sharpness-all": ("one or all ↓", "error", "{:.3f}"),
    "text": ("text ↓", "validation loss", "{:.3f}"),
    "images": ("images ↑", "test accuracy", "{:.3f}"),
}


def studies_table(main):
    """The page's table of MAIN or of all other variants: each study's mean result, with the range
    in brackets."""
    tried = {row["variant"] for name in COLUMNS for row in STUDIED[name]}
    rest = [name for name in VARIANTS if name in tried and name not in MAIN]
    heading = ["attention", *(heading for heading, *_ in COLUMNS.values())]
    lines = [heading, ["---"] * len(heading)]
    for name in MAIN if main else rest:
        cells = []
        for study, (_, result, form) in COLUMNS.items():
            values = compare.values(STUDIED[study], name, result)
            shown = [form.format(f(values)) for f in (mean, min, max)] if values else []
            cells.append("{} ({} to {})".format(*shown) if values else "")
        lines.append([f"`{name}`", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


ANSWER_FORMATS = {"text": ("{:+.3f} ± {:.3f}", 1), "images": ("{:+.1f} ± {:.1f} points", 100)}
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


def answers_of(study):
    return compare.answers(STUDIED[study], STUDIES[study])


def p_of(answer):
    return "< 0.001" if answer.p < 0.001 else f"{answer.p:.3f}"


def answers_table():
    """The page's table of differences on text and images, with corrected p-values."""
    lines = [
        "| attention | minus | text, loss | p | images, accuracy | p |",
        "|---|---|---|---|---|---|",
    ]
    for text, images in zip(*map(answers_of, ANSWER_FORMATS), strict=True):
        cells = []
        for answer, (form, unit) in zip((text, images), ANSWER_FORMATS.values(), strict=True):
            cells += [form.format(unit * answer.difference, unit * answer.half_width), p_of(answer)]
        than = {"nala": "NaLa"}.get(text.baseline, text.baseline)
        lines.append(f"| {label_of(text.variant)} | {than} | {' | '.join(cells)} |")
    return "\n".join(lines)


def powers_table():
    """The page's table of NaLa with smaller powers, on text."""
    labels = {
        "lam 1": "1 for queries and keys",
        "lam 2": "2 for queries and keys",
        "lam 1 of queries": "1 for queries only",
        "lam 1 of keys": "1 for keys only",
    }
    lines = ["| λ, instead of 3 | text, loss minus NaLa's | p |", "|---|---|---|"]
    for x in answers_of("text-powers"):
        lines.append(
            f"| {labels[x.variant]} | {x.difference:+.3f} ± {x.half_width:.3f} | {p_of(x)} |"
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
    answers = {x.variant: x for x in answers_of("text-convolution")}
    for name, label in {"nala": "NaLa", "lam 1": "NaLa, λ = 1", **OTHERS, **LABELS}.items():
        variant = f"{name}{WITHOUT}".removeprefix("nala, ")
        study = "text-powers" if name == "lam 1" else "text"
        losses = [mean(results_of(study, name)), mean(results_of("text-convolution", variant))]
        cells = [label, *(f"{loss:.3f}" for loss in losses), "", ""]
        if variant in answers:
            x = answers[variant]
            cells[3:] = f"{x.difference:+.3f} ± {x.half_width:.3f}", p_of(x)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


ELSEWHERE = {  # study: (what it changes, format of a difference, its factor)
    "text-long": ("windows of 1,024 characters", "{:+.3f} ± {:.3f}", 1),
    "text-gate": ("no gate", "{:+.3f} ± {:.3f}", 1),
    "images-powers": ("images", "{:+.1f} ± {:.1f} points", 100),
}


def elsewhere_table():
    """The page's table of longer windows, of blocks without a gate and of powers on images."""
    lines = ["| what is different | attention | minus NaLa's | p |", "|---|---|---|---|"]
    named = {"lam 1": "NaLa, λ = 1", "lam 2": "NaLa, λ = 2", **LABELS}
    for study, (change, form, unit) in ELSEWHERE.items():
        for x in answers_of(study):
            label, gap = (
                named[x.variant.split(", ")[0]],
                form.format(unit * x.difference, unit * x.half_width),
            )
            lines.append(f"| {change} | {label} | {gap} | {p_of(x)} |")
    return "\n".join(lines)


def answers_verdict():
    """The answers that are significant after correction."""
    parts = []
    for study in ANSWER_FORMATS:
        clear = [label_of(x.variant) for x in answers_of(study) if x.p < 0.05]
        clear = [re.sub(", (same state)", r" (\1)", name) for name in clear]
        parts.append(f"on {study} {', '.join(clear) or 'none'}")
    return f"Significant after correction: {'; '.join(parts)}."


def shorter_runs():
    """The sentence of both pages about the text study, whose differences are significant."""
    clear = {
        x.variant: x.difference for x in answers_of("text") if x.p < 0.05 and x.baseline == "nala"
    }
    plain = [-clear[name] for name in LABELS]
    assert min(plain) > 0  # NaLa is behind all three
    bare = {x.variant.removesuffix(WITHOUT): -x.difference for x in answers_of("text-convolution")}
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
    """The page's table of rank correlations of entropy with norms: mean over seeds and blocks, with
    the range of the blocks' means."""
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
    """Mean correlation over seeds and blocks, then the lowest and the highest mean of a block."""
    rows = [row for row in PREMISE[study]["results"]["correlations"] if row["variant"] == attention]
    blocks = sorted({row["block"] for row in rows})
    means = [mean(row[norm] for row in rows if row["block"] == block) for block in blocks]
    return mean(means), min(means), max(means)


FACTORS = {"half": ", half rates", "as used": "", "double": ", double rates"}
RATES = {"text-rates": ("text", "{:.3f}", -1), "images-rates": ("images", "{:.3f}", 1)}


def rates_table():
    """The page's table of results at half, the usual and double learning rates."""
    shown = [(study, factor) for study in RATES for factor in FACTORS]
    lines = [
        ["attention", *(f"{RATES[study][0]}, {factor}" for study, factor in shown)],
        ["---"] * (1 + len(shown)),
    ]
    for name in ATTENTIONS:
        cells = (mean(results_of(study, name + FACTORS[factor])) for study, factor in shown)
        forms = (RATES[study][1] for study, _ in shown)
        lines.append([f"`{name}`", *(f.format(x) for f, x in zip(forms, cells, strict=True))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rates_verdict():
    """Attentions that are significantly better with other rates, and the gain from the best rates
    of each."""
    better, gains = [], []
    for study, (_, _, sign) in RATES.items():
        for name in ATTENTIONS:
            means = {f: sign * mean(results_of(study, name + end)) for f, end in FACTORS.items()}
            gains.append((study, max(means.values()) - means["as used"]))
            for factor in ("half", "double"):
                middle, half = difference_of(study, name + FACTORS[factor], baseline=name)
                if sign * middle > half:
                    better.append(f"{LABELS.get(name, 'NaLa')} with {factor} on {RATES[study][0]}")
    most = {study: max(gain for s, gain in gains if s == study) for study in RATES}
    ahead = [
        f"{LABELS[name]} on {RATES[study][0]} ({shown_difference(study, name, '{:+.3f} ± {:.3f}')})"
        for study in RATES
        for name in ATTENTIONS[1:]
        if abs(difference_of(study, name)[0]) > difference_of(study, name)[1]
    ]
    return (
        f"Significantly better with other rates: {', '.join(better) or 'none'}. The best of the"
        f" three means is never more than {most['text-rates']:.3f} nats or"
        f" {100 * most['images-rates']:.1f} points better than with the rates as used."
        " Significantly different from NaLa as used, in these short runs:"
        f" {', '.join(ahead) or 'none'}."
    )


def test_other_learning_rates_agree_with_their_cards():
    assert f"\n\n{rates_table()}\n\n" in PAGE
    assert rates_verdict() in PROSE
    for study, steps in (("text-rates", "1,200 steps"), ("images-rates", "900")):
        assert f"{STUDIES[study].task.steps:,}" in steps and steps in PROSE


def test_the_tables_of_studies_agree_with_their_cards():
    for main in (True, False):
        assert f"\n\n{studies_table(main)}\n\n" in PAGE
    for name, text in evidence().items():
        assert text in PROSE, name


def test_the_default_studies_fit_two_hours_on_two_cores():
    assert sum(CARDS[name]["seconds"] for name in compare.DEFAULT_STUDIES) / 2 < 7200


@pytest.mark.parametrize("study", CARDS)
def test_a_study_s_card_is_of_the_current_study(study):
    card, now = CARDS[study], STUDIES[study]
    runs = [(row["variant"], row["seed"]) for row in card["results"]["runs"]]
    assert runs == [(v, seed) for seed in range(1, now.seeds + 1) for v in now.variants]
    assert card["config"]["variants"] == list(now.variants)
    task = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(now.task).items()}
    added = {  # fields added since some cards, with the values they had then
        "weight_decay": 0.1,
        "schedule": "cosine",
        "held_out": False,
    }
    recorded = added | card["config"]["task"]
    assert recorded == added | {k: v for k, v in task.items() if k not in ("file", "folder")}
    command = card["command"].replace("nala_min.compare", "nala_min.lab.compare")  # before lab/
    assert command == f"python -m nala_min.lab.compare --study {study}"


def test_the_readme_s_conclusions_follow_from_the_cards():
    """Conclusions 1 and 2, and the claims about the norm, the cosine map and the settings."""
    # Every run is ahead of elu + 1 and ReLU with equally large states; softmax recalls everything.
    for name in ("elu, same state", "relu, same state"):
        assert min(results_of("recall", "nala")) > max(results_of("recall", name))
        assert max(results_of("sharpness", "nala")) < min(results_of("sharpness", name))
    assert min(results_of("recall", "softmax")) == 1 > max(results_of("recall", "nala"))
    # Where a query may have to average all keys, elu + 1 is better than NaLa and ReLU is worse.
    assert mean(results_of("sharpness-all", "elu, same state")) < mean(
        results_of("sharpness-all", "nala")
    )
    assert min(results_of("sharpness-all", "relu, same state")) > max(
        results_of("sharpness-all", "nala")
    )
    # Without the norm, NaLa is as bad as ReLU; without the cosine map, it recalls far less.
    norm, relu = (mean(results_of("sharpness", n)) for n in ("no query norm", "relu, same state"))
    assert norm == pytest.approx(relu, abs=0.001)
    for study, name in (("sharpness", "no query norm"), ("recall", "no cosine map, same state")):
        middle, half = difference_of(study, name)
        assert abs(middle) > half
    for study, name in (
        ("sharpness", "no cosine map, same state"),
        ("sharpness", "magnitude-aware, same state"),
        ("recall", "no query norm"),
    ):
        middle, half = difference_of(study, name)
        assert abs(middle) < half
    # No other lam, tau, alpha or tanh is significantly better.
    for study in ("recall", "sharpness", "sharpness-all"):
        sign = 1 if study == "recall" else -1
        for name in STUDIES[study].variants:
            if name[:3] in ("lam", "tau", "alp", "tan"):
                middle, half = difference_of(study, name)
                assert sign * middle < half, (study, name)  # not significantly better
        worse = {"recall": ["lam 1", "lam 1 of keys"], "sharpness": ["alpha 2", "lam 1"]}
        for name in worse.get(study, ["alpha 2"]):
            middle, half = difference_of(study, name)
            assert sign * middle < -half  # significantly worse
    middle, half = difference_of("recall", "q and k 5 times as large")
    assert abs(middle) < half


def test_the_answers_of_text_and_images_are_their_cards():
    """Neither the norm nor the cosine map holds NaLa back; softmax does not need the norm."""
    assert f"\n\n{answers_table()}\n\n" in PAGE
    assert answers_verdict() in PROSE and shorter_runs() in PROSE
    p_values = {(x.variant, x.baseline): x.p for x in answers_of("text")}
    for name in ("no query norm", "no cosine map, same state", "split"):
        assert p_values[name, "nala"] > 0.05
    assert p_values["softmax, one norm", "softmax"] > 0.05
    for study, steps in (("text", "1,000 steps"), ("images", "500")):
        assert f"{STUDIES[study].task.steps:,}" in steps and steps in PROSE


def test_the_power_holds_nala_back_on_text():
    """With λ = 1 it is level with softmax, elu + 1 and ReLU, run with the same seeds."""
    assert f"\n\n{powers_table()}\n\n" in PAGE
    assert results_of("text", "nala") == results_of("text-powers", "nala")  # bit for bit
    p_values = {x.variant: x.p for x in answers_of("text-powers")}
    assert p_values["lam 1"] < 0.05
    recalled = [f"{mean(results_of('recall', name)):.0%}" for name in ("lam 1", "nala")]
    assert "recalls {} of 64 values instead of {}".format(*recalled) in PROSE
    others = {}
    for name, label in LABELS.items():
        others[label] = compare.difference(
            results_of("text-powers", "lam 1"), results_of("text", name)
        )
        assert abs(others[label][0]) < others[label][1], label
    shown = [f"{label} ({x:+.3f} ± {half:.3f})" for label, (x, half) in others.items()]
    assert "level with {}, {} and {}.".format(*shown) in PROSE


def test_runs_without_the_convolution_agree_with_their_card():
    assert f"\n\n{convolution_table()}\n\n" in PAGE
    bare = {x.variant.removesuffix(WITHOUT): x for x in answers_of("text-convolution")}
    for name, x in bare.items():  # NaLa is last
        assert (x.p > 0.05) if name in OTHERS else (x.difference < 0 and x.p < 0.05)
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


def test_other_settings_agree_with_their_cards():
    """Only without the gate is a difference significant; both attentions are better without it."""
    assert f"\n\n{elsewhere_table()}\n\n" in PAGE
    for study in ELSEWHERE:
        for x in answers_of(study):
            assert (x.difference > 0) == (study == "images-powers")
            assert (x.p < 0.05) == (study == "text-gate")
    gains = [
        compare.difference(results_of("text-gate", without), results_of("text", name))
        for name, without in {"nala": "no gate", "softmax": "softmax, no gate"}.items()
    ]
    assert all(middle < -half for middle, half in gains)
    assert "NaLa {:+.3f} ± {:.3f}, softmax {:+.3f} ± {:.3f}".format(*gains[0], *gains[1]) in PROSE


def test_the_premise_in_trained_models_agrees_with_its_cards():
    assert f"\n\n{premise_table()}\n\n" in PAGE
    for study, card in PREMISE.items():
        assert card["config"]["seeds"] == STUDIES[study].seeds
    rows = PREMISE["text"]["results"]["correlations"]
    softmax = [row for row in rows if row["variant"] == "softmax"]
    assert max(row["query_norm"] for row in softmax) < -0.8  # every block, every seed
    assert abs(correlation("text", "softmax", "key_norm")[0]) < 0.2
    assert all(abs(correlation("text", name, "query_norm")[0]) < 0.2 for name in ("nala", "elu"))


def test_alt_texts_of_the_studies_pictures_agree_with_the_cards():
    shares = [
        f"{mean(results_of('recall', name)):.2f}"
        for name in ("nala", "no query norm", "elu, same state", "no cosine map, same state")
    ]
    assert (
        "NaLa falls to {} at 64 pairs, without the query norm to {}; elu + 1 with an equally large"
        " state to {}; NaLa with ReLU instead of cosines, with the same state size, to {}".format(
            *shares
        )
    ) in PROSE
    errors = [
        f"{mean(results_of('sharpness', name, f'error of {kind}')):.2f}"
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
BOTH_PASSES = {"pass": "forward + backward"}


def ratio(rows, slow, fast, **which):
    """slow's time divided by fast's: two forms, or two contexts of one form."""
    times = [bench.select(rows, **which, **one)[0]["median"] for one in (slow, fast)]
    return times[0] / times[1]


def speedup(length, form="nala", causal=True, results=SPEED):
    pair = {"form": "softmax"}, {"form": form}
    return ratio(results["attention"], *pair, length=length, causal=causal, **BOTH_PASSES)


def format_ratio(number):
    return f"{number:.2f}" if number < 10 else f"{number:.1f}"


def test_softmax_s_relative_times_agree_with_the_run_cards():
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
        assert cells == [format_ratio(speedup(n, *forms[name])) for n in lengths], name


def cells(heading):
    """The two-column table with this heading on the page, as a dict."""
    (table,) = re.findall(rf"^\| {heading} \|\n\|---\|---\|\n((?:\|.+\n)+)", PAGE, re.MULTILINE)
    return dict(line.strip("| ").split(" | ") for line in table.strip().splitlines())


def steps_table():
    """The page's table of training steps: NaLa's time and memory against softmax's."""

    def step(form, what, window):
        return bench.select(LONG["steps"], form=form, block=window)[0][what]

    def over(what, one, other):
        return [format_ratio(step(one, what, n) / step(other, what, n)) for n in bench.LONG_WINDOWS]

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


def time_ratio(window):
    """Time of a whole run with softmax, divided by NaLa's."""
    runs = LONG_RUNS[window]
    return runs["softmax"]["seconds"] / runs["nala"]["seconds"]


def long_runs_table():
    """The page's table of whole runs with long windows."""
    lines = [
        "| windows of | steps | NaLa | softmax | time, softmax's ÷ NaLa's |",
        "|---|---|---|---|---|",
    ]
    for window, runs in LONG_RUNS.items():
        results = [
            f"{run['results']['validation_loss']:.3f} after {run['seconds'] / 60:.1f} min"
            for run in runs.values()
        ]
        steps = runs["nala"]["config"]["steps"]
        lines.append(f"| {window:,} | {steps} | {' | '.join(results)} | {time_ratio(window):.1f} |")
    return "\n".join(lines)


def test_whole_runs_with_long_windows_agree_with_their_cards():
    assert f"\n\n{long_runs_table()}\n\n" in PAGE
    for window, runs in LONG_RUNS.items():
        ours, theirs = (run["config"] | {"attention": ""} for run in runs.values())
        assert ours == theirs and (ours["block"], ours["batch"]) == (window, 1)
        assert {run["hardware"]["threads"] for run in runs.values()} == {2}
        losses = [run["results"]["validation_loss"] for run in runs.values()]
        assert max(losses) - min(losses) < 0.01  # "about the same"


def speed_cells():
    """The last column of the page's table of other speed measurements."""
    step = partial(ratio, SPEED["steps"])
    decode = partial(ratio, SPEED["decode"])
    peaks = [
        bench.select(SPEED["attention"], form=form, length=16384, causal=True, **BOTH_PASSES)[0][
            "peak"
        ]
        for form in ("nala", "softmax")
    ]
    crossover = SPEED["crossover"]["causal, forward + backward"]
    compiled = bench.crossover(SPEED["attention"], form="compiled", causal=True, **BOTH_PASSES)
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
        f"{crossover:,}; compiled {compiled:,}",
        f"{peaks[0] / peaks[1]:.2f}",
        steps[256],
        steps[64],
        f"{decode({'context': 16384}, {'context': 64}, form='nala'):.2f}",
        after["softmax_grown"],
        after["softmax"],
        f"{long['softmax']['median'] / long['nala']['median']:.0f}",
        f"{held[0]:.0f}; {held[1]:.0f}; {held[2]:,.0f} MiB",
    ]


def test_segment_sizes_agree_with_their_card():
    rows = runcard.read_json(runcard.RESULTS / "speed_cpu_segments.json")["results"]["segments"]
    ratios = [
        ratio(rows, {"form": f"2^{i}"}, {"form": "2^17"}, causal=causal)
        for causal in (True, False)
        for i in range(15, 20)
    ]
    assert len(rows) == len(ratios) and fast.SEGMENT == 2**17
    shown = f"{min(ratios):.2f} to {max(ratios):.2f} times as long"
    assert f"At 65,536 tokens, segments of 2^15 to 2^19 take {shown}" in PROSE


def test_the_other_speed_measurements_agree_with_the_run_cards():
    assert f"\n\n{steps_table()}\n\n" in PAGE
    assert list(cells(r"\| measured").values()) == speed_cells()


def test_the_times_of_other_libraries_agree_with_the_run_card():
    expected = []
    for form in ("fla_naive_chunk", "fast_transformers", "performer_pytorch"):
        ratios = [
            ratio(PEERS, {"form": form}, {"form": "nala"}, length=2**i, **BOTH_PASSES)
            for i in range(10, 15)
        ]
        expected.append(f"{min(ratios):.3f} to {max(ratios):.3f}")
    assert list(cells(r"library \| time ÷ ours").values()) == expected
    pair = {"form": "product"}, {"form": "nala"}
    share = ratio(SPEED["attention"], *pair, length=4096, causal=True, **BOTH_PASSES)
    assert f"alone takes {share:.0%} at 4,096 tokens" in PROSE
    pair, alone = ({"form": "fast_transformers"}, {"form": "nala"}), {"pass": "forward"}
    sentence = f"alone takes {ratio(PEERS, *pair, length=16384, **alone):.3f} times as long as ours"
    assert f"{sentence} at 16,384 tokens" in PROSE


def test_missed_targets_and_another_machine_s_times():
    assert speedup(4096) < 5 and speedup(16384) < 17
    step = ratio(SPEED["steps"], {"form": "nala"}, {"form": "softmax"}, block=256)
    assert step > 1.2
    assert ratio(SPEED["decode"], {"form": "softmax"}, {"form": "nala"}, context=16384) < 10
    ranges = []
    for form in ("softmax", "nala"):
        ours, epyc = (
            [
                row["median"]
                for row in bench.select(card["attention"], form=form, causal=True, **BOTH_PASSES)
                if row["length"] >= 1024
            ]
            for card in (SPEED, EPYC)
        )
        ratios = [a / b for a, b in zip(ours, epyc, strict=True)]
        ranges.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
    assert "softmax takes {} times as long as on the EPYC, NaLa {}.".format(*ranges) in PROSE


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
        peaks = [
            bench.select(SPEED["attention"], form=form, **which)[0]["peak"]
            for form in ("nala", "softmax")
        ]
        assert peaks[0] <= 2 * peaks[1]
    assert "at most twice its memory from 16,384 tokens" in PROSE
    crossover = speed_in_short()[0]
    assert f"Causal NaLa is faster than the fused softmax {crossover}" in PROSE


# --- Faults and mutants ---------------------------------------------------------------------------


def test_the_table_of_faults_agrees_with_its_run_card():
    results = runcard.read_json(runcard.RESULTS / "faults.json")["results"]
    (rows,) = re.findall(r"^\| fault \|.+\n\|---.+\n((?:\|.+\n)+)", PAGE, re.MULTILINE)
    assert rows.strip() == faults.table(results)
    assert len(rows.strip().splitlines()) == len(faults.ROWS)
    assert all(row.endswith("| nothing |") for row in rows.strip().splitlines())
    assert results["compare"]["ended study"]["left"] == 0
    for script in faults.SCRIPTS:
        kills = results[script]["kill -9"]
        assert kills["times"] >= 20 and min(kills["phases"].values()) >= 5


def test_the_mutation_score_agrees_with_its_run_card():
    card = runcard.read_json(runcard.RESULTS / "mutation.json")
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
