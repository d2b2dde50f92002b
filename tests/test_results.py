"""notebooks/results/README.md: every number and verdict is recomputed from the run cards, and the
studies and scripts still have the recipes that the cards record."""

import re
from dataclasses import fields, replace
from fnmatch import filter as matching
from functools import cache, partial
from itertools import product
from math import exp
from statistics import mean

import faults
import mutate
import pytest

import train_cifar
import train_shakespeare
from nala_min import runcard
from nala_min.flags import parse_flags
from nala_min.lab import bench, compare
from nala_min.lab.studies import STUDIES, build_model

PAGE = (runcard.RESULTS / "README.md").read_text(encoding="utf-8").replace(" %", "%")
PROSE = " ".join(PAGE.split())
ATTENTIONS = ("nala", "softmax", "elu", "relu")
OTHERS = ATTENTIONS[1:]
SCRIPTS = {"shakespeare": train_shakespeare, "cifar": train_cifar}
LOSS, POINTS = "{:+.3f} ± {:.3f}", "{:+.1f} ± {:.1f} points"
FORMS = {"text": LOSS, "shakespeare": LOSS, "images": POINTS, "cifar": POINTS}
BARE = ", no convolution"  # added to a variant's name
OPENED = set()  # names of cards


@cache
def read(name):
    OPENED.add(name)
    return runcard.read_json(runcard.RESULTS / f"{name}.json")


def cards(task, attention):
    """The cards of a script's default recipe with one attention, by seed."""
    return [read(f"{task}_cpu_{attention}_seed{seed}") for seed in range(1, 6)]


def default(task):
    return read(f"{task}_cpu_default")


def final_results(task, attention):
    result = {"shakespeare": "validation_loss", "cifar": "test_accuracy"}[task]
    return [card["results"][result] for card in cards(task, attention)]


def runs_of(study):
    return read(f"compare_{study}")["results"]["runs"]


def base_of(study):
    """The study, or the one that an earlier study was derived from."""
    return STUDIES.get(study) or STUDIES[study.partition("-")[0]]


def results_of(study, variant, result=None):
    if study in SCRIPTS:
        return final_results(study, variant)
    return compare.values(runs_of(study), variant, result or base_of(study).task.result)


def difference_of(study, variant, baseline="nala", other=None):
    """Mean difference from the baseline's result, maybe in another study, and half its interval."""
    return compare.difference(results_of(study, variant), results_of(other or study, baseline))


def verdict(study, *variants):
    """Whether a variant is level with its baseline, better or worse."""
    difference, half = difference_of(study, *variants)
    is_better = (difference > 0) == study.startswith(("recall", "images", "cifar"))
    return "level" if abs(difference) < half else "better" if is_better else "worse"


EARLIER = {  # questions of studies that an earlier commit ran; other cards have one each
    "text-powers": ("lam 1", "lam 2", "lam 1 of queries", "lam 1 of keys"),
    "text-convolution": tuple(f"{x}{BARE}" for x in (*OTHERS, "split", "lam 1", "no query norm")),
}


@cache
def p_of(study, variant):
    baseline = "no convolution" if study == "text-convolution" else "nala"
    questions = tuple((name, baseline) for name in EARLIER.get(study, [variant]))
    asked = STUDIES.get(study) or replace(base_of(study), questions=questions)
    (p,) = [x.p for x in compare.answers(runs_of(study), asked) if x.variant == variant]
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# --- What the page shows --------------------------------------------------------------------------


def average(study, variant, result=None, form="{:.2f}"):
    return form.format(mean(results_of(study, variant, result)))


def spread(form, values):
    return f"{form.format(min(values))} to {form.format(max(values))}"


def gap(study, *variants):
    form = FORMS.get(study.partition("-")[0], "{:+.2f} ± {:.2f}")
    unit = 100 if form == POINTS else 1
    return form.format(*(unit * x for x in difference_of(study, *variants)))


def small_tasks():
    """The sentence of both pages about text and images."""
    assert {verdict(task, name) for task in SCRIPTS for name in OTHERS} == {"level"}
    return "On Shakespeare and on CIFAR-10, NaLa is level with softmax, elu + 1 and ReLU."


def shorter_runs():
    text = [-difference_of("text", name)[0] for name in OTHERS]
    bare = [-difference_of("text-convolution", x + BARE, BARE[2:])[0] for x in OTHERS]
    return (
        f"In runs a third as long, with eight seeds, it is {spread('{:.3f}', text)} nats behind"
        " them on text, but level with λ = 1 instead of 3. Without the block's convolution, it is"
        f" {spread('{:.2f}', bare)} behind."
    )


def about_scripts():
    yield small_tasks()
    for task, form in {"shakespeare": "{:.3f}", "cifar": "{:.1%}"}.items():
        for name in ATTENTIONS:
            values, minus = final_results(task, name), gap(task, name) if name in OTHERS else ""
            middle = form.format(mean(values))
            yield f"| `{name}` | **{middle}** | {spread(form, values)} | {minus} |"
        card, config = default(task), default(task)["config"]
        (result,) = {"validation_loss", "test_accuracy"} & card["results"].keys()
        reached = form.format(card["results"][result])
        yield f"reached {reached} after {card['seconds']:.0f} s of training"
        yield f"({card['results']['parameters'] / 1e6:.2f} M parameters)"
        yield f"{config['steps']:,} steps of {config['batch']} "
    yield f"32 images, {config['steps'] * 32 / 50_000:.1f} epochs."


def about_variants():
    columns = dict.fromkeys(("recall", "sharpness", "sharpness-all", "text", "images"), "{:.3f}")
    columns["recall"], seconds = "{:.2f}", []
    for name in dict.fromkeys(row["variant"] for study in columns for row in runs_of(study)):
        values = [(form, results_of(study, name)) for study, form in columns.items()]
        cells = [f"{form.format(mean(x))} ({spread(form, x)})" if x else "" for form, x in values]
        yield f"| `{name}` | {' | '.join(cells)} |"
    for study in ("recall", "sharpness", "text", "images"):
        kept = STUDIES[study].variants
        seconds.append(sum(row["seconds"] for row in runs_of(study) if row["variant"] in kept))
    recall, change, small = partial(average, "recall"), partial(gap, "recall"), "nala, D = 4"
    none, clipped, relu = "no query norm", "no cosine map, same state", "relu, same state"
    one, many = (results_of("sharpness", "nala", f"norm of {kind}") for kind in ("one", "many"))
    errors = [average("sharpness", name, f"error of {kind}")
              for name in (none, "elu, same state") for kind in ("one", "many")]  # fmt: skip
    yield from f"""
its error is {gap("sharpness", none)[1:]} larger, the same as ReLU's
it recalls {change(clipped)[1:]} less; on *one or its group* it is as good
to a norm of {spread("{:.1f}", one)} and short ones to {spread("{:.2f}", many)}.
without the norm, recall changes by {change(none)}.
start five times as large ({change("q and k 5 times as large")}).
for keys only, recall changes by {change("lam 1 of keys")}, for queries only by
for queries only by {change("lam 1 of queries")}.
Eight heads of 4 channels recall {recall(small)}, four of 8 as much as two of 16 (
two of 16 ({recall("nala, D = 8")}), one of 32 less again ({recall("nala, D = 32")}), although
heads of 4 channels recall {change("no query norm, D = 4", small)} more.
With λ = 1, recall drops ({change("lam 1")}). With λ = 2 it may rise (
With λ = 2 it may rise ({LOSS.format(*difference_of("recall", "lam 2"))}; more seeds
at `ba010f6`), λ = 2 recalls {gap("recall-powers", "lam 2")} more (p =
more (p = {p_of("recall-powers", "lam 2")}), though one of its runs
one of its runs falls to {min(results_of("recall-powers", "lam 2")):.2f};
NaLa recalls {recall("lam 1", form="{:.0%}")} of 64 values instead of
64 values instead of {recall("nala", form="{:.0%}")}.
NaLa falls to {recall("nala")} at 64 pairs, without the query norm to {recall(none)}; elu + 1
elu + 1 with an equally large state to {recall("elu, same state")}; NaLa with ReLU instead of
with the same state size, to {recall(clipped)}; ReLU falls from
; ReLU falls from {recall(relu, "accuracy at 4 pairs")} to {recall(relu)}.
the query norm lie at {errors[0]} and {errors[1]}, elu + 1 with an equally large state at
with an equally large state at {errors[2]} and {errors[3]}.
takes about {sum(seconds[:3]) / 120:.0f} minutes on two cores
`--study images` another {seconds[3] / 120:.0f} minutes
""".strip().splitlines()


LABELS = {  # on the page
    "softmax": "softmax", "elu": "elu + 1", "elu, same state": "elu + 1, same state",
    "relu": "ReLU", "relu, same state": "ReLU, same state", "split": "sign split",
    "no query norm": "NaLa without its norm",
    "no cosine map, same state": "NaLa with ReLU for its cosines, same state",
    "lam 1": "1 for queries and keys", "lam 2": "2 for queries and keys",
    "lam 1 of queries": "1 for queries only", "lam 1 of keys": "1 for keys only",
}  # fmt: skip


def about_text_and_images():
    def answer(study, *pair):
        return f"{gap(study, *pair)} | {p_of(study, pair[0])}"

    def losses(name, without, study="text"):
        return f"{average(study, name, None, '{:.3f}')} | {average(bare, without, None, '{:.3f}')}"

    bare, powers, one = "text-convolution", "text-powers", f"lam 1{BARE}"
    for name, baseline in STUDIES["text"].questions:
        label, than = LABELS.get(name, "softmax with one norm"), baseline.replace("nala", "NaLa")
        answers = " | ".join(answer(study, name, baseline) for study in ("text", "images"))
        yield f"| {label} | {than} | {answers} |"
    yield from (f"| {LABELS[x]} | {answer(powers, x)} |" for x in EARLIER[powers])
    others = {"lam 1": "NaLa, λ = 1", "split": "NaLa with the sign split"}
    for name in ("lam 1", "no query norm", "split", *OTHERS):
        usual = losses(name, name + BARE, powers if name == "lam 1" else "text")
        label = others.get(name) or LABELS[name]
        yield f"| {label} | {usual} | {answer(bare, name + BARE, BARE[2:])} |"
        if name != "softmax":
            assert verdict(bare, "softmax" + BARE, name + BARE) == "better"
    gains = {"text-rates": [0.0], "images-rates": [0.0]}
    for study, name, by in product(gains, ATTENTIONS, ("half", "double")):
        change, _ = difference_of(study, f"{name}, {by} rates", name)
        gains[study].append(change if study == "images-rates" else -change)
        assert verdict(study, f"{name}, {by} rates", name) != "better"
    yield from f"""
{shorter_runs()}
| NaLa | {losses("nala", BARE[2:])} | | |
shortened to {STUDIES["text"].task.steps:,} steps on Tiny Shakespeare (loss in nats) and
(loss in nats) and {STUDIES["images"].task.steps} on CIFAR-10 (accuracy).
With λ = 1, NaLa is level with softmax ({gap(powers, "lam 1", "softmax", "text")}), elu + 1 (
elu + 1 ({gap(powers, "lam 1", "elu", "text")}) and ReLU (
and ReLU ({gap(powers, "lam 1", "relu", "text")}). But
is level with elu + 1 ({gap(bare, one, f"elu{BARE}")}) and
and ReLU ({gap(bare, one, f"relu{BARE}")}), and about half
Loss minus NaLa's: softmax {gap("text-long", "softmax")}, elu + 1 {gap("text-long", "elu")}, λ = 1
λ = 1 {gap("text-long", "lam 1")}.
its loss minus NaLa's is {gap("text-gate", "softmax, no gate", "no gate")}. In
even better without a gate (NaLa {gap("text-gate", "no gate", "nala", "text")}, softmax
softmax {gap("text-gate", "softmax, no gate", "softmax", "text")}).
λ = 1 changes the accuracy by {gap("images-powers", "lam 1")}, λ = 2 by
λ = 2 by {gap("images-powers", "lam 2")}. Neither is significant
{max(gains["text-rates"]):.3f} nats or {100 * max(gains["images-rates"]):.1f} points better than
in these short runs: softmax on text ({gap("text-rates", "softmax")}). Cards:
""".strip().splitlines()


PAPER = "2506.21137 81.2 82.1 82.5 82.9 29.08 27.82 26.59 25.89 2.5 92.3 0.3 7.5 2.2".split()


def about_the_paper_s_claims():
    entropies, clipped = read("entropy_gap")["results"]["entropies"], "no cosine map, same state"
    elu, relu, nala = ([*map(exp, entropies[name])] for name in ("elu", "relu", "nala"))
    assert max(elu) - min(elu) < 1 and max(relu) - min(relu) < 1e-4
    assert {verdict("images", x) for x in ("no query norm", clipped)} == {"level"}
    recall, text = (  # with NaLa's features, minus without
        " and ".join(gap(study, f"nala-{x}", x) for x in ("delta", "gated-delta"))
        for study in ("recall-delta", "text-delta")
    )
    held = {row["form"]: f"{row['peak'] / 2**20:,.0f}" for row in LONG["long"]}
    yield from f"""
elu + 1's keys change by less than one of 64, ReLU's not at all |
| from {nala[0]:.0f} to {nala[-1]:.0f} of 64 keys; without its norm, the error on
error on *one or its group* is {gap("sharpness", "no query norm")[1:]} larger |
| without it {gap("images", "no query norm")} on CIFAR-10, after 500 steps |
| recall {gap("recall", clipped)} without it; CIFAR-10 {gap("images", clipped)} |
| recall {gap("recall-alpha", "alpha 1")} with this angle, not α = 20 |
| softmax {gap("cifar", "softmax")} on CIFAR-10 |
| recall {recall}; loss on text {text} |
| {speedup(16384)} times as fast as the fused softmax at 16,384 tokens, on a CPU |
| at 70,000 tokens {held["nala"]} MiB; the fused softmax {held["softmax"]} |
""".strip().splitlines()  # noqa: RUF001


def about_the_delta_rule_and_the_angle():
    for name in ("recall-delta", "text-delta", "recall-alpha"):
        f = "{:.3f}" if name == "text-delta" else "{:.2f}"
        for x in STUDIES[name].variants:
            yield f"| `{x}` | {average(name, x, None, f)} | {spread(f, results_of(name, x))} |"
        for pair in STUDIES[name].questions:
            yield f"| `{pair[0]}` | `{pair[1]}` | {gap(name, *pair)} | {p_of(name, pair[0])} |"


def about_the_premise():
    """Correlations: the mean over seeds and blocks, then the lowest and highest mean of a block."""
    for name in ATTENTIONS:
        cells = []
        for study, norm in product(("text", "images"), ("query_norm", "key_norm")):
            rows = read(f"premise_{study}")["results"]["correlations"]
            rows = [row for row in rows if row["variant"] == name]
            blocks = {row["block"] for row in rows}
            means = [mean(x[norm] for x in rows if x["block"] == block) for block in blocks]
            cells.append(f"{mean(means):+.2f} ({spread('{:+.2f}', means)})")
        yield f"| `{name}` | {' | '.join(cells)} |"


SPEED, EPYC, LONG = (read(f"speed_cpu_{x}")["results"] for x in ("float32", "epyc", "long"))
BOTH = {"pass": "forward + backward"}
CAUSAL = {"causal": True, **BOTH}


def ratio(rows, slow, fast="nala", what="median", **which):
    """One form's time, or memory, divided by another's."""
    numbers = [bench.select(rows, form=form, **which)[0][what] for form in (slow, fast)]
    return numbers[0] / numbers[1]


def speedup(length, form="nala", causal=True, results=SPEED):
    case = {"length": length, "causal": causal, **BOTH}
    number = ratio(results["attention"], "softmax", form, **case)
    return f"{number:.2f}" if number < 10 else f"{number:.1f}"


def long_runs(window):
    """The cells of a row about two whole runs that differ in their attention."""
    runs = [read(f"shakespeare_cpu_{x}_block{window}") for x in ("nala", "softmax")]
    ours, theirs = (run["config"] | {"attention": ""} for run in runs)
    assert ours == theirs and (ours["block"], ours["batch"]) == (window, 1)
    ends = [(run["results"]["validation_loss"], run["seconds"] / 60) for run in runs]
    cells = ["{:.3f} after {:.1f} min".format(*end) for end in ends]
    return [f"{window:,}", str(ours["steps"]), *cells, f"{ends[1][1] / ends[0][1]:.1f}"]


def speed_in_short():
    """From how many tokens causal NaLa is faster than the fused softmax, and by how much at 16,384;
    then the gain in training on long windows."""
    crossover = bench.crossover(SPEED["attention"])
    assert crossover == bench.crossover(EPYC["attention"])
    return (
        f"from {crossover:,} tokens",
        f"at 16,384 it is {speedup(16384)} times as fast ({speedup(16384, results=EPYC)} on an AMD"
        f" EPYC). On windows of 8,192 characters it trains {long_runs(8192)[-1]} times as fast, to"
        " about the same loss",
    )


def about_speed():
    for name, *form in (
        ("causal", "nala"), ("causal, sign split", "split"), ("causal, compiled", "compiled"),
        ("bidirectional", "nala", False), ("bidirectional, compiled", "compiled", False),
        ("causal, on an AMD EPYC", "nala", True, EPYC),
    ):  # fmt: skip
        times = (speedup(n, *form) for n in (64, 256, 1024, 4096, 16384, 65536))
        yield f"| {name} | {' | '.join(times)} |"
    peers, on_epyc = read("speed_cpu_peers")["results"]["peers"], []
    for name, form in (("flash-linear-attention 0.6.0", "fla_naive_chunk"),
                       ("pytorch-fast-transformers 0.4.0", "fast_transformers"),
                       ("performer-pytorch 1.1.4", "performer_pytorch")):  # fmt: skip
        times = [ratio(peers, form, length=2**i, **BOTH) for i in range(10, 15)]
        yield f"{name} | {spread('{:.3f}', times)} |"
    for form in ("softmax", "nala"):
        ours, epyc = (bench.select(x["attention"], form=form, **CAUSAL)[4:] for x in (SPEED, EPYC))
        times = [a["median"] / b["median"] for a, b in zip(ours, epyc, strict=True)]
        on_epyc.append(spread("{:.2f}", times))
    decode = partial(ratio, SPEED["decode"], context=16384)
    near, far = (bench.select(SPEED["decode"], form="nala", context=n)[0] for n in (64, 16384))
    peak = partial(ratio, SPEED["attention"], "nala", "softmax", "peak", **CAUSAL)
    step = partial(ratio, SPEED["steps"], fast="softmax", block=256)
    segments = partial(ratio, read("speed_cpu_segments")["results"]["segments"], fast="2^17")
    sizes = [segments(f"2^{i}", causal=x) for i in range(15, 20) for x in (True, False)]
    held = {row["form"]: f"{row['peak'] / 2**20:,.0f}" for row in LONG["long"]}
    assert max(peak(length=n) for n in (16384, 32768, 65536)) <= 2
    yield from f"""
faster than the fused softmax {speed_in_short()[0]} and uses at most twice its memory from 16,384
at least as fast | {bench.crossover(SPEED["attention"]):,}; compiled
; compiled {bench.crossover(SPEED["attention"], "compiled"):,} |
peak memory at 16,384 tokens, NaLa's ÷ softmax's | {peak(length=16384):.2f} |
÷ after 64 | {far["median"] / near["median"]:.2f} |
with a growing cache, as in our code | {decode("softmax_grown"):.1f} |
which our code lacks | {decode("softmax"):.1f} |
elu + 1's ÷ softmax's | {step("nala"):.3f}; {step("elu"):.3f} |
windows of 16,384: softmax's time ÷ NaLa's | {ratio(LONG["steps"], "softmax", block=16384):.2f} |
forward and backward: softmax's time ÷ NaLa's | {ratio(LONG["long"], "softmax"):.0f} |
(counted, not run) | {held["nala"]}; {held["softmax"]}; {held["written out"]} MiB |
| {" | ".join(long_runs(4096))} |
| {" | ".join(long_runs(8192))} |
softmax takes {on_epyc[0]} times as long as on the EPYC, NaLa {on_epyc[1]}.
elements of q take {spread("{:.2f}", sizes)} times as long as 2^17
alone takes {ratio(SPEED["attention"], "product", length=4096, **CAUSAL):.0%} at 4,096 tokens
""".strip().splitlines()


def about_faults():
    results = read("faults")["results"]
    yield from faults.table(results).replace(" %", "%").splitlines()
    assert faults.table(results).count("| nothing |") == len(faults.FAULTS) == 5
    for script in ("train_shakespeare", "train_cifar"):
        kills = results[script]["kill -9"]
        assert kills["times"] >= 20 and min(kills["phases"].values()) >= 5


def about_mutants():
    rooms = read("mutation")["results"]["rooms"]
    assert rooms.keys() <= mutate.ROOMS.keys() and "model.py" in rooms
    for name, found in rooms.items():
        tried, caught = found["mutants"], found["caught"]
        assert tried == caught + len(found["survivors"]) and all(found["equivalent"].values())
        assert caught / tried >= {"model.py": 0.97, "lab/": 0.75, "course/": 0.75}.get(name, 0.85)
        assert tried + len(found["equivalent"]) >= 40
        yield f"| `{name}` | {tried} | {caught} | {caught / tried:.1%} |"


ABOUT = [about_scripts, about_variants, about_text_and_images, about_the_premise, about_speed]
ABOUT += [about_faults, about_mutants, about_the_delta_rule_and_the_angle]
ABOUT += [about_the_paper_s_claims]


@pytest.mark.parametrize("claims", ABOUT, ids=lambda function: function.__name__)
def test_the_page_says_what_the_cards_say(claims):
    assert [x for x in claims() if " ".join(x.split()) not in PROSE] == []


def test_every_number_on_the_page_is_recomputed_and_every_card_is_used():
    proved = set()
    for claim in (re.escape(" ".join(x.split())) for claims in ABOUT for x in claims()):
        for match in re.finditer(claim, PROSE):
            proved |= {*range(*match.span())}
    others = {x[0] for x in re.finditer(r"\d+\.\d+", PROSE) if x.start() not in proved}
    assert others - {*PAPER} == {"0.05", "4.5", "1.88", "1.4697", "2.13"}  # levels, nanoGPT's, ...
    names = {path.name for path in runcard.RESULTS.iterdir()}
    assert all(matching(names, x) for x in re.findall(r"[\w*-]+\.(?:json|png)", PAGE))
    elsewhere = {"entropy_gap"}  # in test_readme.py
    assert {name[:-5] for name in names if name.endswith(".json")} == OPENED | elsewhere


def test_the_conclusions_of_the_page_follow_from_the_cards():
    """Verdicts on variants, compared with NaLa. No other setting beats the paper's."""
    for study, expected, variants in (
        ("recall", "level", "no query norm; q and k 5 times as large; lam 2"),
        ("recall", "worse", "elu, same state; relu, same state; lam 1; lam 1 of keys"),
        ("sharpness", "level", "no cosine map, same state; magnitude-aware, same state"),
        ("sharpness", "worse", "elu, same state; relu, same state; no query norm; alpha 2; lam 1"),
        ("sharpness-all", "worse", "relu, same state; no query norm; alpha 2"),
        ("sharpness-all", "level", "elu, same state"),
    ):
        assert {verdict(study, name) for name in variants.split("; ")} == {expected}
        tried = {row["variant"] for row in runs_of(study)}
        settings = [name for name in tried if re.match("lam|tau|alpha|tanh", name)]
        assert "better" not in {verdict(study, name) for name in settings}


# --- Recipes, mutants and commands ----------------------------------------------------------------


@pytest.mark.parametrize("task", SCRIPTS)
def test_a_script_s_default_recipe_is_that_of_its_cards(task):
    first = default(task)
    settings = vars(parse_flags(SCRIPTS[task].Settings, ["--preset", "cpu"]))
    assert {name: settings[name] for name in first["config"]} == first["config"]
    for name in ATTENTIONS:
        for seed, card in enumerate(cards(task, name), 1):
            assert card["config"] == first["config"] | {"attention": name, "seed": seed}
            assert card["data"] == first["data"] and card["hardware"]["threads"] == 1


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_s_recipe_data_and_models_are_those_of_its_card(study, tmp_path):
    """A card may have more variants: those that only an earlier commit can run."""
    card, now, task = read(f"compare_{study}"), STUDIES[study], STUDIES[study].task
    tried, seeds = card["config"]["variants"], range(1, now.seeds + 1)
    found = [(row["seed"], row["variant"]) for row in runs_of(study)]
    assert sorted(found) == sorted(product(seeds, tried))
    recipe = runcard.to_plain({x.name: getattr(task, x.name) for x in fields(task) if x.repr})
    assert recipe.items() <= card["config"]["task"].items()
    assert now.quick == {"recall": 60, "sharpness": 300}.get(study.partition("-")[0], 40)
    if script := {"text": "shakespeare", "images": "cifar"}.get(study.partition("-")[0]):
        assert card["data"]["sha256"] == default(script)["data"]["sha256"]
    if script == "shakespeare":  # as many characters
        (tmp_path / "text.txt").write_text(50 * "".join(map(chr, range(40, 105))), encoding="utf-8")
        task = replace(task, file=tmp_path / "text.txt")
    parameters = {row["variant"]: row["parameters"] for row in runs_of(study)}
    for name in now.variants:
        weights = build_model(task, name, 1).parameters()
        assert sum(x.numel() for x in weights if x.requires_grad) == parameters[name]
        twice = study.startswith("sharpness") and name.endswith(", same state")
        assert parameters[name] == pytest.approx((1 + twice) * parameters[tried[0]], rel=0.01)
