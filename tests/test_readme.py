"""The README: its commands, its code and every number of its tables."""

import re
from functools import partial
from pathlib import Path
from statistics import mean

import faults
import pytest

from nala_min import runcard
from nala_min.lab import bench, compare
from nala_min.lab.studies import STUDIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ATTENTIONS = ("nala", "softmax", "elu", "relu")
# The cards of a table: their result, the table's heading, how it writes a number, the images' name.
TABLES = {
    "shakespeare": ("validation_loss", "loss", "{:.3f}", "Tiny Shakespeare"),
    "cifar": ("test_accuracy", "accuracy", "{:.1%}", "CIFAR-10 (files in a folder)"),
}
tables = pytest.mark.parametrize("task", TABLES)


def cards(task, attention):
    """The committed cards of a task's default run with another attention, by seed."""
    paths = runcard.RESULTS.glob(f"{task}_cpu_{attention}_seed*.json")
    return sorted((runcard.read_json(path) for path in paths), key=lambda c: c["config"]["seed"])


def default(task):
    return runcard.read_json(runcard.RESULTS / f"{task}_cpu_default.json")


@tables
def test_results_table_is_the_run_cards(task):
    result, heading, form, _ = TABLES[task]
    (table,) = re.findall(rf"^\| attention, {heading} .+?\n\n", README, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|$", table, re.MULTILINE)
    assert [name for name, _ in rows] == list(ATTENTIONS)
    for name, row in rows:
        values = [card["results"][result] for card in cards(task, name)]
        assert len(values) == 3
        written = [form.format(value) for value in values] + [f"**{form.format(mean(values))}**"]
        assert row.replace(" %", "%").split(" | ") == written, name


@pytest.mark.parametrize(
    ("task", "command"),
    [
        ("shakespeare", "python train_shakespeare.py"),
        ("cifar", "python train_cifar.py --data-dir ."),
    ],
)
def test_the_default_run_is_its_run_card(task, command):
    result, _, form, _ = TABLES[task]
    card = default(task)
    assert card["command"] == command
    number = form.format(card["results"][result]).replace("%", " %")
    said = f"reached {number} after {card['seconds']:.0f} s of training"
    assert said in " ".join(README.split())
    assert card["config"] == cards(task, "nala")[0]["config"]


@pytest.mark.parametrize("attention", ["nala", "softmax"])
@tables
def test_the_health_cards_are_seed_1_once_more(task, attention):
    """The same run; on images, where another machine ended elsewhere, the README says so."""
    result, _, form, _ = TABLES[task]
    card = runcard.read_json(runcard.RESULTS / f"{task}_cpu_{attention}_health.json")
    first = cards(task, attention)[0]
    for key in ("config", "data", "versions"):
        assert card[key] == first[key]
    again, before = (form.format(x["results"][result]) for x in (card, first))
    if again != before:
        text = " ".join(README.split()).replace(" %", "%")
        assert (
            f"{again} instead of {before} for {'NaLa' * (attention == 'nala') or 'softmax'}" in text
        )


def test_the_stand_in_of_the_image_model_is_its_run_card():
    card = runcard.read_json(runcard.RESULTS / "cifar_cpu_synthetic.json")
    assert card["config"] == default("cifar")["config"]
    assert card["data"]["name"] == "drawn digits (stand-in)"
    number = f"{card['results']['test_accuracy']:.1%}".replace("%", " %")
    assert f"the same recipe reached {number}" in " ".join(README.split())


@tables
def test_the_runs_of_a_table_differ_in_attention_and_seed_only(task):
    everything = [card for name in ATTENTIONS for card in cards(task, name)]
    for key in ("data", "versions"):
        assert all(card[key] == everything[0][key] for card in everything), key
    same = {"attention": "", "seed": 0}
    assert all(card["config"] | same == everything[0]["config"] | same for card in everything)
    assert {card["config"]["attention"] for card in everything} == set(ATTENTIONS)
    assert len({card["results"]["parameters"] for card in everything}) == 1
    assert everything[0]["data"]["name"] == TABLES[task][3]


def test_code_in_the_readme_runs():
    (code,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    scope = {}
    exec(code, scope)
    whole = scope["nala_attention"](scope["q"], scope["k"], scope["v"], causal=True)
    assert scope["out_rest"] == pytest.approx(whole[:, :, 700:], abs=1e-5)


def test_every_linked_file_is_there():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


# --- When does it help? ---------------------------------------------------------------------------

CARDS = {name: runcard.RESULTS / f"compare_{name}.json" for name in STUDIES if "gpu" not in name}
CARDS = {name: runcard.read_json(path) for name, path in CARDS.items()}
STUDIED = {name: card["results"]["runs"] for name, card in CARDS.items()}


def found(study, variant, result=None):
    return compare.values(STUDIED[study], variant, result or STUDIES[study].task.result)


def away(study, variant, than="nala"):
    """Mean difference of variant's result from another's, and half its 95 % interval."""
    return compare.difference(found(study, variant), found(study, than))


def said(study, variant, form="{:+.2f} ± {:.2f}"):
    return form.format(*away(study, variant))


def evidence():
    """What stands in the README's text for each of these marks."""
    norms = {kind: found("sharpness", "nala", f"norm of {kind}") for kind in ("one", "many")}
    runs = [
        f"{names} {sum(share > 0.5 for share in found('binding', name))}"
        for name, names in {
            "softmax": "softmax solves",
            "no gate": "NaLa without its gate",
            "relu, same state": "ReLU with a state as large",
            "lam 1": "NaLa with λ = 1",
        }.items()
    ]
    minutes = sum(card["seconds"] for card in CARDS.values()) / 2 / 60
    return {
        "@A1@": said("sharpness", "no query norm").lstrip("+"),
        "@A2@": said("recall", "no cosine map, same state").lstrip("-"),
        "@A3@": said("recall", "no query norm"),
        "@L1@": said("recall", "lam 1"),
        "@L2@": said("recall", "lam 2", "{:+.3f} ± {:.3f}"),
        "@Q5@": said("recall", "q and k 5 times as large"),
        "@N1@": f"{min(norms['one']):.1f} to {max(norms['one']):.1f}",
        "@N2@": f"{min(norms['many']):.2f} to {max(norms['many']):.2f}",
        "@B@": ", ".join(runs),
        "@H@": f"{minutes:.0f} minutes",
    }


def test_the_table_of_studies_is_their_cards():
    table = compare.overview({name: STUDIED[name] for name in compare.COLUMNS})
    assert f"\n\n{table}\n\n" in README
    for mark, text in evidence().items():
        assert text in " ".join(README.split()), mark


@pytest.mark.parametrize("study", CARDS)
def test_a_study_s_card_is_of_the_study_as_it_is(study):
    card, now = CARDS[study], STUDIES[study]
    runs = [(row["variant"], row["seed"]) for row in card["results"]["runs"]]
    assert runs == [(v, seed) for seed in range(1, now.seeds + 1) for v in now.variants]
    assert card["config"]["variants"] == list(now.variants)
    task = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(now.task).items()}
    assert card["config"]["task"] == {k: v for k, v in task.items() if k not in ("file", "folder")}
    command = card["command"].replace("nala_min.compare", "nala_min.lab.compare")  # before lab/
    assert command == f"python -m nala_min.lab.compare --study {study}"


def test_what_the_readme_concludes_is_in_the_cards():
    """1: ahead of elu + 1 and ReLU with states as large, run by run; softmax recalls more."""
    for name in ("elu, same state", "relu, same state"):
        assert min(found("recall", "nala")) > max(found("recall", name))
        assert max(found("sharpness", "nala")) < min(found("sharpness", name))
    assert min(found("recall", "softmax")) == 1 > max(found("recall", "nala"))
    # 2: nothing beyond chance on text and images
    for study in ("text", "images"):
        for name in STUDIES[study].variants[1:]:
            middle, half = away(study, name)
            assert abs(middle) < half, (study, name)
    for name in ("softmax", "elu", "relu"):
        assert mean(found("text", name)) < mean(found("text", "nala"))
        assert mean(found("images", name)) > mean(found("images", "nala"))
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
        for name in STUDIES["recall"].variants:
            if name[:3] in ("lam", "tau", "alp", "tan"):
                middle, half = away(study, name)
                assert sign * middle < half, (study, name)  # not beyond chance better
        for name in ("alpha 2", "lam 1") if study != "sharpness-all" else ("alpha 2",):
            middle, half = away(study, name)
            assert sign * middle < -half  # beyond chance worse
    middle, half = away("recall", "q and k 5 times as large")
    assert abs(middle) < half
    assert abs(away("text", "no query norm")[0]) < away("text", "no query norm")[1]
    solved = {v for v in STUDIES["binding"].variants if max(found("binding", v)) > 0.5}
    assert solved == {"softmax", "no gate", "relu, same state", "lam 1"}


def test_the_alternative_texts_of_the_studies_pictures_are_the_cards():
    shares = [
        f"{mean(found('recall', name)):.2f}"
        for name in ("nala", "no query norm", "elu, same state", "no cosine map, same state")
    ]
    text = " ".join(README.split())
    assert (
        "NaLa falls to {} at 64 pairs, without the query norm to {}; elu + 1 with a state as large"
        " to {}; NaLa with ReLU for its cosines, its state as large, to {}".format(*shares)
    ) in text
    errors = [
        f"{mean(found('sharpness', name, f'error of {kind}')):.2f}"
        for name in ("no query norm", "elu, same state")
        for kind in ("one", "many")
    ]
    assert (
        "the query norm lie at {} and {}, elu + 1 with a state as large at {} and {}".format(
            *errors
        )
    ) in text


# --- Speed ----------------------------------------------------------------------------------------

SPEED = runcard.read_json(runcard.RESULTS / "speed_cpu_float32.json")["results"]
PEERS = runcard.read_json(runcard.RESULTS / "speed_cpu_peers.json")["results"]["peers"]
BOTH = {"pass": "forward + backward"}


def ratio(rows, slow, fast, **which):
    """How many times as long slow takes as fast: two forms, or two contexts of one form."""
    times = [bench.select(rows, **which, **one)[0]["median"] for one in (slow, fast)]
    return times[0] / times[1]


def against_softmax(length, form="nala", causal=True):
    pair = {"form": "softmax"}, {"form": form}
    return ratio(SPEED["attention"], *pair, length=length, causal=causal, **BOTH)


def short(number):
    return f"{number:.2f}" if number < 10 else f"{number:.1f}"


def test_how_many_times_as_long_softmax_takes_is_the_run_card():
    (table,) = re.findall(
        r"^\| softmax's time ÷ NaLa's \|.+?\n\n", README, re.MULTILINE | re.DOTALL
    )
    heading, _, *rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()]
    lengths = [int(cell.replace(",", "")) for cell in heading[1:]]
    forms = {
        "causal": ("nala", True),
        "causal, sign split": ("split", True),
        "causal, compiled": ("compiled", True),
        "bidirectional": ("nala", False),
        "bidirectional, compiled": ("compiled", False),
    }
    assert [row[0] for row in rows] == list(forms)
    for name, *cells in rows:
        assert cells == [short(against_softmax(n, *forms[name])) for n in lengths], name


def test_aims_of_speed_and_what_came_out_are_the_run_cards():
    rows = dict(re.findall(r"^\| (.+?) \| [≥≤>] \S+ \| (.+?) \|$", README, re.MULTILINE))
    step = partial(ratio, SPEED["steps"], {"form": "nala"}, {"form": "softmax"})
    decode = partial(ratio, SPEED["decode"])
    peaks = [
        bench.select(SPEED["attention"], form=form, length=16384, causal=True, **BOTH)[0]["peak"]
        for form in ("nala", "softmax")
    ]
    place = SPEED["crossover"]["causal, forward + backward"]
    compiled = bench.crossover(SPEED["attention"], form="compiled", causal=True, **BOTH)
    want = {
        "causal, 4,096 tokens: softmax's": f"{short(against_softmax(4096))}; compiled"
        f" {short(against_softmax(4096, 'compiled'))}",
        "the same at 16,384": f"{short(against_softmax(16384))}; compiled"
        f" {short(against_softmax(16384, 'compiled'))}",
        "NaLa is never the slower": f"{place:,}; compiled {compiled:,}",
        "peak memory at 16,384": f"{peaks[0] / peaks[1]:.2f}",
        "a step of training": f"{step(block=256):.3f}",
        "the same with windows": f"{step(block=64):.3f}",
        "decoding": f"{decode({'context': 16384}, {'context': 64}, form='nala'):.2f}",
    }
    for form, name in (("softmax_grown", "after 16,384"), ("softmax", "the same, its cache")):
        want[name] = f"{decode({'form': form}, {'form': 'nala'}, context=16384):.1f}"
    for form, name in (
        ("fla_naive_chunk", "flash-linear-attention"),
        ("fast_transformers", "pytorch-fast-transformers"),
        ("performer_pytorch", "performer-pytorch"),
    ):
        found = [
            ratio(PEERS, {"form": form}, {"form": "nala"}, length=2**i, **BOTH)
            for i in range(10, 15)
        ]
        want[name] = f"{min(found):.3f} to {max(found):.3f}"
    pair = {"form": "product"}, {"form": "nala"}
    share = ratio(SPEED["attention"], *pair, length=4096, causal=True, **BOTH)
    assert f"alone takes {share:.0%}".replace("%", " %") in " ".join(README.split())
    elu = partial(ratio, SPEED["steps"], {"form": "elu"}, {"form": "softmax"})
    said = f"it takes {elu(block=256):.3f} and {elu(block=64):.3f} of softmax's time"
    assert said in " ".join(README.split())
    pair, alone = ({"form": "fast_transformers"}, {"form": "nala"}), {"pass": "forward"}
    said = f"forward pass alone takes {ratio(PEERS, *pair, length=16384, **alone):.3f} of our time"
    assert said in " ".join(README.split())
    assert f"For fewer than {place:,} tokens softmax is the faster" in README
    assert len(rows) == len(want)
    for name, value in want.items():
        (said,) = (
            cell
            for label, cell in rows.items()
            if label.startswith(name) or f" of {name} " in label
        )
        assert said == value, name


# --- When something breaks ------------------------------------------------------------------------


def test_what_was_lost_is_the_run_card():
    results = runcard.read_json(runcard.RESULTS / "faults.json")["results"]
    (rows,) = re.findall(r"^\| fault \|.+\n\|---.+\n((?:\|.+\n)+)", README, re.MULTILINE)
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
        f"Of {found['mutants']} mutants of `model.py`, every second one that"
        f" `tests/tools/mutate.py` makes, {equivalent} do just what it does, as far as we can see;"
        f" of the others the tests caught {found['caught']}, {share:.1%}"
    ).replace("%", " %")
    assert said in " ".join(README.split())
