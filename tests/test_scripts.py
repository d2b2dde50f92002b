"""train_shakespeare.py and train_cifar.py as a user sees them: what they train on, measure, write,
print and refuse. With small models, in this process and without a network."""

import functools
import hashlib
import runpy
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imsave
from scripts import assert_mistake, files_below, flags_of, run_here

import train_cifar
import train_shakespeare
from nala_min import Config, NaLaLM, NaLaViT, data, measure, plots, runcard, train

TEXT = "".join(f"line {i}: the quick brown fox jumps över 5 € dogs.\n" for i in range(200))
CUT = len(TEXT) * 9 // 10
TEXT = TEXT[:CUT] + TEXT[CUT:].upper()  # nothing in the last tenth is like the rest
SMALL = {"heads": 2, "dim": 16, "batch": 8, "steps": 20, "lr": 0.02, "muon": 0.05, "dropout": 0.25}
SIZES = {
    train_shakespeare: SMALL | {"layers": 1, "block": 8},
    train_cifar: SMALL | {"layers": 2, "patch": 8, "shift": 1, "attention": "elu,nala"},
}
DEFAULT = {"preset": "cpu", "attention": "nala", "seed": 1, "schedule": "linear"}
INPUT = {train_shakespeare: ["--data", "text.txt"], train_cifar: ["--data-dir", "images"]}
NEXT_BATCH = {train_shakespeare: "random_windows", train_cifar: "shuffled_batch"}
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
both = pytest.mark.parametrize("script", SIZES, ids=lambda script: script.__name__)


few_digits = functools.cache(functools.partial(data.drawn_images, 40, 30))


def few_images(patch):
    """20 per file, of which 8 for the curve, instead of 10,000 and 1,000; and few digits."""
    patch.setattr(data, "IMAGES_PER_FILE", 20)
    patch.setattr(train_cifar, "CURVE_TEST_IMAGES", 8)
    patch.setattr(data, "drawn_images", few_digits)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a text, images of noise and a run of each script, named like the script."""
    made = SimpleNamespace(out={}, card={}, model={}, shown=[])
    made.folder = tmp_path_factory.mktemp("finished")
    (made.folder / "text.txt").write_bytes(TEXT.encode("utf-8"))
    (made.folder / "images").mkdir()
    noise = np.random.default_rng(0).integers(256, size=(6, 20, 3073), dtype=np.uint8)
    noise[:, :, 0] %= 10  # labels
    for name, records in zip(data.CIFAR10_FILES, noise, strict=True):
        (made.folder / "images" / name).write_bytes(records.tobytes())
    noise = torch.from_numpy(noise)
    images, labels = noise[:, :, 1:].reshape(120, 3, 32, 32), noise[:, :, 0].flatten().long()
    made.training, made.test = (images[:100], labels[:100]), (images[100:], labels[100:])

    sizes = {"num_heads": 2, "dim": 16}
    made.model[train_shakespeare] = NaLaLM(Config(vocab_size=len(set(TEXT)), num_layers=1, **sizes))
    vit = NaLaViT(Config(patch_size=8, num_layers=2, attention=["elu", "nala"], **sizes))
    made.model[train_cifar] = vit.to(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch:
        few_images(patch)
        draw = plots.attention_maps
        patch.setattr(plots, "attention_maps", lambda *x: made.shown.extend(x) or draw(*x))
        for script in SIZES:
            out = made.folder / script.__name__
            result = run_here(script, made.folder, *flags(script, "--out", out.name))
            assert result.returncode == 0, result.stderr
            made.out[script], made.card[script] = (
                result.stdout,
                runcard.read_json(out / "card.json"),
            )
            made.model[script].load_state_dict(
                train.load_checkpoint(out / "checkpoint.pt")["model"]
            )
            made.model[script].eval()
    return made


def flags(script, *more):
    return [*flags_of(SIZES[script]), *INPUT[script], *more]


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy of finished, to change. No more pictures, which are slow."""
    few_images(monkeypatch)
    monkeypatch.setattr(plots, "write", lambda *_: None)
    return shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)


def handed_to_fit(script, folder, flags):
    """What script hands to train.fit, and its output so far. Nothing is trained."""
    given = {}

    def fit(model, recipe, **options):
        given.update(options, model=model, recipe=recipe)
        sys.exit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit", fit)
        result = run_here(script, folder, *flags)
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(**given, out=result.stdout)


# --- Both scripts ---------------------------------------------------------------------------------

RECIPES = [
    (train_shakespeare, (6, 6, 384, 64, 4000, 0.001, 0.02, 0.1, 0.2), {"block": 256}),
    (train_cifar, (7, 6, 192, 256, 7000, 0.002, 0.02, 0.1, 0.0), {"patch": 2, "shift": 4}),
]


@pytest.mark.parametrize(("script", "values", "own"), RECIPES)
def test_the_default_recipe_for_a_gpu(script, values, own):
    """That for a CPU is on the cards: see test_results.py."""
    names = "layers heads dim batch steps lr muon weight_decay dropout".split()
    settings = script.Settings(preset="gpu", device="cpu")
    chosen = dict(zip(names, values, strict=True)) | own
    assert settings.config() == DEFAULT | chosen | {"preset": "gpu"}
    recipe = settings.recipe(torch.device("cpu"))
    assert (recipe.warmup, recipe.beta2, recipe.clip, recipe.bfloat16) == (100, 0.99, 1.0, False)
    assert recipe.eval_every == chosen["steps"] // 10 and train_cifar.CURVE_TEST_IMAGES == 1000


@both
def test_a_run_says_what_it_trained_on_what_and_writes_nothing_else(script, finished):
    out, card, folder = finished.out[script], finished.card[script], finished.folder
    size = f"{sum(x.numel() for x in finished.model[script].parameters()):,} parameters"
    if script is train_shakespeare:
        content, described = TEXT.encode("utf-8"), {"name": "text.txt", "characters": len(TEXT)}
        extra, pictures = {"characters": "".join(sorted(set(TEXT)))}, ["curve.png"]
        line = f"text.txt: {len(TEXT):,} characters, {len(set(TEXT))} distinct. NaLaLM, attention"
        line += f" nala: {size} on cpu."
    else:
        described = {"name": "CIFAR-10 (files in a folder)"}
        content = b"".join(x.numpy().tobytes() for x in (*finished.training, *finished.test))
        extra, pictures = {"classes": CLASSES}, ["curve.png", "maps.png"]
        line = "CIFAR-10 (files in a folder): 100 images to train on. NaLaViT on cpu, attention"
        line += f" elu,nala, {size}."
    assert out.startswith(line + "\nNo committed run used these flags") and "\nstep    20 " in out
    assert card["data"] == described | {"sha256": hashlib.sha256(content).hexdigest()}
    assert card["config"] == DEFAULT | SIZES[script] | {"weight_decay": 0.02}
    assert f"{card['results']['parameters']:,} parameters" == size
    saved = train.load_checkpoint(folder / script.__name__ / "checkpoint.pt")
    extra |= {"data": card["data"], "code": {"name": "nala_min", "sha256": card["code"]}}
    extra |= {x: y for x, y in saved["extra"].items() if x.startswith("recipe.")}
    assert saved["extra"] == card["config"] | extra
    written = sorted(path.name for path in (folder / script.__name__).iterdir())
    assert written == ["card.json", "checkpoint.pt", *pictures]


@both
def test_the_seed_decides_weights_and_data_the_attention_neither(script, folder):
    """For a fair comparison, every attention sees the same data."""
    cases = [], [], ["--attention", "softmax"], ["--seed", 2, "--compile"]
    one, same, softmax, other = (handed_to_fit(script, folder, flags(script, *x)) for x in cases)
    for step in range(3):
        for equal, given in ((True, softmax), (False, other)):
            pairs = zip(one.batch(step), given.batch(step), strict=True)
            assert [torch.equal(*pair) for pair in pairs] == [equal, equal]
    assert torch.equal(one.model.head.weight, same.model.head.weight)
    assert not torch.equal(one.model.head.weight, other.model.head.weight)
    assert (one.recipe.seed, other.recipe.seed) == (1, 2)
    assert (one.compile, other.compile, one.model.config.dropout) == (False, True, 0.25)


@both
def test_an_interrupted_run_resumes_bit_for_bit(script, finished, folder, monkeypatch):
    """Also with dropout, between two points of the curve."""
    next_batch, command = getattr(data, NEXT_BATCH[script]), flags(script, "--out", "parts")
    steps, sample = [], finished.card[script]["results"].get("sample")

    def until_stop(*arguments):
        steps.append(arguments[-1])
        if steps == [0, 1, 2, 3, 4, 5]:
            signal.raise_signal(signal.SIGINT)
        return next_batch(*arguments)

    monkeypatch.setattr(data, NEXT_BATCH[script], until_stop)
    monkeypatch.setattr(train_shakespeare, "generate_text", lambda *_: sample)  # slow
    broken = run_here(script, folder, *command)
    assert broken.returncode == 130
    assert broken.stderr.endswith("interrupted: --resume continues from step 6\n")
    assert [path.name for path in (folder / "parts").iterdir()] == ["checkpoint.pt"]
    assert run_here(script, folder, *command, "--resume").returncode == 0
    results = runcard.read_json(folder / "parts" / "card.json")["results"]
    assert results == finished.card[script]["results"] and steps == [*range(20)]


@both
def test_a_result_is_saved_before_what_needs_more_memory(script, finished, folder, monkeypatch):
    """By a run that was finished, resumes without training and says what earlier runs reached."""
    monkeypatch.setattr(measure, "attention_stats", lambda *_: [][0])
    monkeypatch.setattr(data, NEXT_BATCH[script], None)
    monkeypatch.setattr(runcard, "RESULTS", folder)
    name, results = script.__name__, finished.card[script]["results"]
    shutil.move(folder / name / "card.json", folder / f"{name.removeprefix('train_')}_1.json")
    with pytest.raises(IndexError):
        run_here(script, folder, *flags(script, "--out", name, "--resume"))
    saved = runcard.read_json(folder / name / "card.json")["results"]
    assert saved == {x: results[x] for x in results if x not in ("attention_stats", "sample")}
    key = "validation_loss" if script is train_shakespeare else "test_accuracy"
    expected = f"\nExpect a {key.replace('_', ' ')} of about {results[key]:.2f} "
    assert expected in handed_to_fit(script, folder, flags(script)).out


OF_TEXT, OF_IMAGES = ["--out", "train_shakespeare"], ["--out", "train_cifar"]
MISTAKES = [  # flags, and what the message names
    (train_shakespeare, ["--data", "nowhere.txt"], "--data nowhere.txt"),
    (train_shakespeare, ["--data", "images/test_batch.bin"], "--data images"),  # not UTF-8
    (train_shakespeare, ["--block", len(TEXT) - CUT], "--data text.txt"),
    (train_shakespeare, ["--prompt", "ß"], "--prompt"),
    (train_shakespeare, [*OF_TEXT, "--sample", 5, "--prompt", "ß"], "--prompt"),
    (train_shakespeare, [*OF_TEXT, "--sample", 5, "--attention", "no.py"], "no.py"),
    (train_shakespeare, [*OF_IMAGES, "--sample", 5], "train_cifar"),
    (train_cifar, ["--data-dir", "nowhere"], "--data-dir"),
    (train_cifar, ["--data-dir", "truncated"], "data_batch_5.bin"),
    (train_cifar, ["--data", "synthetic"], "--data synthetic"),
    (train_cifar, ["--batch", 101], "--batch"),
    (train_cifar, ["--patch", 3], "--patch"),
    (train_cifar, ["--shift", -1], "--shift"),
    (train_cifar, [*OF_IMAGES, "--predict", "text.txt"], "--predict text.txt"),
    (train_cifar, [*OF_TEXT, "--predict", "text.txt"], "train_shakespeare"),
    (train_cifar, [*OF_TEXT, "--eval"], "train_shakespeare"),
]


@both
def test_a_mistake_is_one_line_that_names_the_flag_or_file(script, folder, monkeypatch):
    shutil.copytree(folder / "images", folder / "truncated")
    (folder / "truncated" / "data_batch_5.bin").write_bytes(b"\0" * 3073)
    before = files_below(folder)
    for of_script, wrong, named in MISTAKES:
        if of_script is script:
            result = run_here(script, folder, *flags(script, "--out", "new", *wrong))
            assert_mistake(result, script, named)
    assert files_below(folder) == before
    monkeypatch.setattr(sys, "argv", [script.__file__, "--steps", "0"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(script.__file__, run_name="__main__")


# --- Text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "batch", "steps"), [(64, 8, 3400), (256, 4, 3400), (8192, 1, 425), (5_000_000, 1, 1)]
)
def test_longer_windows_mean_fewer_windows_then_fewer_steps(block, batch, steps):
    settings = train_shakespeare.Settings(preset="cpu", device="cpu", block=block)
    assert (settings.batch, settings.steps) == (batch, steps)


def test_a_batch_is_windows_of_the_first_nine_tenths(folder):
    given = handed_to_fit(train_shakespeare, folder, flags(train_shakespeare, "--batch", 300))
    inputs, targets = given.batch(0)
    assert inputs.shape == (300, 8) and torch.equal(inputs[:, 1:], targets[:, :-1])
    for window in torch.cat([inputs, targets[:, -1:]], dim=1).tolist():
        assert "".join(given.extra["characters"][token] for token in window) in TEXT[:CUT]


def test_the_validation_loss_is_that_of_the_last_tenth(finished):
    """Of every fourth window on the curve. The attention is measured on 64 windows."""
    model, results = finished.model[train_shakespeare], finished.card[train_shakespeare]["results"]
    tokens = torch.tensor([sorted(set(TEXT)).index(x) for x in TEXT[CUT:]])
    windows, losses = tokens.unfold(0, 9, 8), []
    for window in windows:
        shares = model(window[None, :-1])[0][0].double().softmax(dim=1)
        losses.append(-sum(shares[i, window[i + 1]].log().item() for i in range(8)) / 8)
    last = results["history"][-1]["validation_loss"]
    assert results["validation_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert last == pytest.approx(np.mean(losses[::4]), abs=1e-5) and len(losses) > 64
    assert results["attention_stats"] == measure.attention_stats(model, windows[:64, :-1])
    sentence = f"\nValidation loss {results['validation_loss']:.4f} nats per character "
    assert sentence in finished.out[train_shakespeare]


def test_a_sample_continues_the_prompt_at_temperature_0_8(finished, folder):
    """From a checkpoint alone. Without a prompt, it continues the first character, a newline."""
    (folder / "train_shakespeare" / "card.json").unlink()
    before, characters = files_below(folder), sorted(set(TEXT))

    def expected(prompt, length, seed):
        tokens = torch.tensor([[characters.index(x) for x in prompt]])
        model = finished.model[train_shakespeare]
        text = model.generate(tokens, length, temperature=0.8, seed=seed)[0]
        return "".join(characters[token] for token in text) + "\n"

    for prompt, seed in (("fox ö", 1), ("", 2)):
        flags = [*OF_TEXT, "--device", "cpu", "--prompt", prompt, "--sample", 99, "--seed", seed]
        result = run_here(train_shakespeare, folder, *flags)
        assert result.stderr == "train_shakespeare, step 20:\n"
        assert result.stdout == expected(prompt or "\n", 99, seed)
    assert files_below(folder) == before
    ending = f"run card: train_shakespeare\n{expected(chr(10), 500, 1)}"
    assert finished.out[train_shakespeare].endswith(ending)
    assert ending.endswith(finished.card[train_shakespeare]["results"]["sample"] + "\n")


# --- Images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [False, True])
def test_a_batch_is_training_images_shifted_and_maybe_mirrored(digits, finished, folder):
    """A mirrored ship is a ship; a mirrored 3 is no digit."""
    source = ["--data", "synthetic"] if digits else INPUT[train_cifar]
    command = [*flags_of(SIZES[train_cifar]), *source, "--shift", 2, "--seed", 3]
    given = handed_to_fit(train_cifar, folder, command)
    pair = data.drawn_images().train if digits else finished.training
    for step in range(3):
        inputs, labels = data.shuffled_batch(*pair, 8, 3, step)
        inputs = data.augment(inputs, 3, step, shift=2, mirror=not digits)
        torch.testing.assert_close(given.batch(step)[0], (inputs.float() - 120) / 64)
        assert torch.equal(given.batch(step)[1], labels)


def test_the_accuracy_is_that_of_the_test_images(finished):
    """Of the first of them on the curve. Four are shown, with the last block's attention."""
    model, results = finished.model[train_cifar], finished.card[train_cifar]["results"]
    confusion, losses = [[0] * 10 for _ in range(10)], []
    for image, label in zip(*finished.test, strict=True):
        shares = model((image[None].float() - 120) / 64)[0].double().softmax(dim=0)
        confusion[label][shares.argmax()] += 1
        losses.append(-shares[label].log().item())
    assert results["confusion"] == confusion
    assert results["test_accuracy"] == pytest.approx(sum(confusion[i][i] for i in range(10)) / 20)
    assert results["test_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert results["history"][-1]["test_loss"] == pytest.approx(np.mean(losses[:8]), abs=1e-5)
    assert results["attention_stats"] == measure.attention_stats(model, finished.test[0])
    assert finished.out[train_cifar].endswith("run card and pictures: train_cifar\n")
    assert torch.equal(finished.shown[0], finished.test[0][:4]) and finished.shown[2] == "NaLa"


def test_the_three_most_confused_pairs_are_printed(monkeypatch, capsys):
    """In either direction: a cat for a dog counts like a dog for a cat."""
    pairs = [(3, 5)] * 2 + [(5, 3)] * 2 + [(0, 8)] * 3 + [(9, 1), (7, 4)] + [(2, 2)] * 9
    true, predicted = torch.tensor(pairs).T
    monkeypatch.setattr(measure, "classify", lambda *_: torch.eye(10)[predicted])
    train_cifar.test(None, data.Images("noise", CLASSES, None, (None, true), mirror=True))
    assert capsys.readouterr().out == (
        "Test accuracy 50.00%, loss 1.9612, on 18 images of noise. Most often confused:\n"
        "  cat and dog: 4 times\n  airplane and ship: 3 times\n  automobile and truck: 1 times\n"
    )


def test_the_loss_of_images_is_smoothed_by_a_tenth(folder):
    """-log(0.9526) = 0.0486 for the right one of two classes, 3.0486 for the other."""
    loss = handed_to_fit(train_cifar, folder, flags(train_cifar)).loss
    value = loss(lambda x: x, torch.tensor([[3.0, 0.0]]), torch.tensor([0])).item()
    assert value == pytest.approx(0.95 * 0.048587 + 0.05 * 3.048587, abs=1e-5)


def test_eval_and_predict_use_a_checkpoint_and_write_nothing(finished, folder):
    """The sizes come from the checkpoint, not from flags."""
    imsave(folder / "x.png", finished.test[0][0].movedim(0, 2).numpy())
    before, command = files_below(folder), [*OF_IMAGES, "--device", "cpu"]
    tested = run_here(train_cifar, folder, *command, "--eval", *INPUT[train_cifar])
    assert tested.stdout.startswith("Test accuracy ") and tested.stderr == ""
    assert tested.stdout in finished.out[train_cifar]
    digits = run_here(train_cifar, folder, *command, "--eval", "--data", "synthetic")
    assert_mistake(digits, train_cifar, "other classes")

    logits = finished.model[train_cifar]((finished.test[0][:1].float() - 120) / 64)[0]
    shares = logits.softmax(dim=0).tolist()
    first = sorted(range(10), key=lambda i: -shares[i])[:3]
    named = ", ".join(f"{CLASSES[i]} {100 * shares[i]:.0f}%" for i in first)
    told = run_here(train_cifar, folder, *command, "--predict", "x.png").stdout
    assert told == f"x.png: {named} (trained on CIFAR-10 (files in a folder))\n"
    assert files_below(folder) == before
