import dataclasses
import hashlib
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imsave
from scripts import assert_mistake, files_below, flags_of, run_here, run_process

import train_cifar
from nala_min import Config, NaLaLM, NaLaViT, data, plots, runcard, synthetic, train

COUNT = 60  # images per file, instead of 10,000
WRONG = 6  # test images of ships labelled as cats, to have mistakes to count
CAT, SHIP = 3, 8
SIZES = {
    "layers": 1,
    "heads": 2,
    "dim": 16,
    "patch": 4,
    "batch": 32,
    "steps": 200,
    "lr": 0.01,
    "muon": 0.05,
    "weight_decay": 0.1,
    "dropout": 0.1,
    "shift": 1,
}
FLAGS = flags_of(SIZES)
CONFIG = SIZES | {"preset": "cpu", "attention": "nala", "seed": 1, "schedule": "linear"}
SHORT = [*FLAGS, "--data-dir", "images", "--steps", "3"]
FROM_FOLDER = "CIFAR-10 (files in a folder)"

pytestmark = pytest.mark.usefixtures("small_files")


@pytest.fixture(scope="module")
def small_files():
    """Accept files of COUNT images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "IMAGES_PER_FILE", COUNT)
        yield


def stripes(kind, phase, side=32):
    """Vertical or horizontal stripes in one of five widths: (side, side), from 0 to 1."""
    positions = np.arange(side) / side * (3, 5, 7, 9, 12)[kind % 5]
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * (positions + phase))
    return np.broadcast_to(wave if kind < 5 else wave[:, None], (side, side))


def write_images(folder, seed=0):
    """Write CIFAR-10's six files with stripes of random phase, one kind per class.

    An image is as likely as its negative, so a linear classifier is right about at most half of
    the images in every class but one.
    """
    random = np.random.default_rng(seed)
    folder.mkdir()
    for name in data.CIFAR10_FILES:
        records = np.empty((COUNT, 1 + 3 * 32 * 32), np.uint8)
        records[:, 0] = random.permutation(COUNT) % 10
        for record in records:
            colour = random.uniform(0.4, 1, (3, 1, 1))
            picture = 0.5 + colour * (stripes(record[0], random.random()) - 0.5)
            record[1:] = (255 * picture).astype(np.uint8).ravel()
        if name == "test_batch.bin":
            records[np.flatnonzero(records[:, 0] == SHIP)[:WRONG], 0] = CAT
        (folder / name).write_bytes(records.tobytes())


def read_images(folder, names):
    """Images (n, 3, 32, 32) and labels (n,) of the files, read without nala_min.data."""
    content = b"".join((folder / name).read_bytes() for name in names)
    records = np.array(list(content), np.uint8).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype("<i8")


TRAINING, TEST = [f"data_batch_{i}.bin" for i in (1, 2, 3, 4, 5)], ["test_batch.bin"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on the stripes: its folders, card and output."""
    folder = tmp_path_factory.mktemp("trained")
    write_images(folder / "images")
    result = run_here(train_cifar, folder, *FLAGS, "--data-dir", "images", "--out", "run")
    assert result.returncode == 0, result.stderr
    card = runcard.read_json(folder / "run" / "card.json")
    return SimpleNamespace(folder=folder, run=folder / "run", card=card, result=result)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*flags): run the script in this process, from tmp_path; without pictures, for speed."""
    monkeypatch.setattr(plots, "write", lambda *arguments: None)
    return partial(run_here, train_cifar, tmp_path)


@pytest.fixture
def files(trained, tmp_path):
    """tmp_path, with the images and a copy of the run."""
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def few_digits(monkeypatch):
    """The stand-in, with fewer digits."""
    digits = data.drawn_images(60, 30)
    monkeypatch.setattr(data, "drawn_images", lambda: digits)
    return digits


@pytest.fixture
def seen(monkeypatch):
    """The script's calls of data.shuffled_batch and data.augment, with the images they return."""
    calls = {"shuffled_batch": [], "augment": []}

    def record(name, original):
        def recorded(*arguments, **options):
            result = original(*arguments, **options)
            images = result if name == "augment" else result[0]
            numbers = tuple(x for x in arguments if not isinstance(x, torch.Tensor))
            calls[name].append(SimpleNamespace(numbers=numbers, options=options, images=images))
            return result

        monkeypatch.setattr(data, name, recorded)

    for name in calls:
        record(name, getattr(data, name))
    return calls


def weights(folder):
    return train.load_checkpoint(folder / "checkpoint.pt")["model"]


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


# --- Training ------------------------------------------------------------------------------------


def test_a_run_writes_its_five_files_and_nothing_else(trained):
    pictures = ["curve.png", "maps.png"]
    assert sorted(path.name for path in trained.run.iterdir()) == [
        "card.json",
        "checkpoint.pt",
        *pictures,
    ]
    for name in pictures:
        assert (trained.run / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n"), name
    assert sorted(path.name for path in trained.folder.iterdir()) == ["images", "run"]


def test_a_run_prints_its_data_accuracy_and_confusions(trained):
    out, results = trained.result.stdout, trained.card["results"]
    assert out.startswith(f"{FROM_FOLDER}: {5 * COUNT} images to train on. NaLaViT on cpu, ")
    assert f" attention nala, {results['parameters']:,} parameters.\n" in out
    assert "\nstep   200 " in out
    accuracy, loss = f"{results['test_accuracy']:.2%}", f"{results['test_loss']:.4f}"
    sentence = f"Test accuracy {accuracy}, loss {loss}, on {COUNT} images of {FROM_FOLDER}."
    assert f"\n{sentence} Most often confused:\n  cat and ship: " in out
    mistakes = [int(n) for n in re.findall(r"^  \w+ and \w+: (\d+) times$", out, re.MULTILINE)]
    assert 1 <= len(mistakes) <= 3 and all(mistakes)
    assert out.endswith(f"Checkpoint, run card and pictures: {Path('run')}\n")


def test_a_run_learns_more_than_a_linear_classifier_can(trained):
    """It is right about all images but the mislabelled ones; see write_images."""
    results = trained.card["results"]
    assert 0.8 <= results["test_accuracy"] <= 1 - WRONG / COUNT
    assert results["confusion"][CAT][SHIP] >= WRONG - 1
    losses = [point["train_loss"] for point in results["history"]]
    assert losses[-1] < losses[0] - 0.8


def test_the_run_card_has_the_recipe_and_the_images(trained):
    assert trained.card["config"] == CONFIG
    sha256 = hashlib.sha256()
    for names in (TRAINING, TEST):
        for array in read_images(trained.folder / "images", names):
            sha256.update(array.tobytes())
    assert trained.card["data"] == {"name": FROM_FOLDER, "sha256": sha256.hexdigest()}
    assert trained.card["command"].startswith("python train_cifar.py --preset cpu ")


def test_the_numbers_on_the_card_are_those_of_the_checkpoint_on_the_test_images(trained):
    saved = train.load_checkpoint(trained.run / "checkpoint.pt")
    data_info = {"data": trained.card["data"], "classes": list(data.CIFAR10_CLASSES)}
    assert saved["extra"] == CONFIG | data_info
    model = NaLaViT(Config(num_layers=1, num_heads=2, dim=16, patch_size=4, dropout=0.1))
    model.load_state_dict(saved["model"])
    model.eval()
    confusion, losses = [[0] * 10 for _ in range(10)], []
    for image, label in zip(*read_images(trained.folder / "images", TEST), strict=True):
        with torch.no_grad():
            shares = model(torch.tensor((image[None] - 120.0) / 64, dtype=torch.float32))
        losses.append(-shares[0].log_softmax(dim=0)[label].item())
        confusion[label][shares[0].argmax()] += 1
    results = trained.card["results"]
    assert results["confusion"] == confusion
    assert sum(map(sum, confusion)) == COUNT
    assert results["test_accuracy"] == pytest.approx(sum(confusion[i][i] for i in range(10)) / 60)
    assert results["test_loss"] == pytest.approx(sum(losses) / COUNT, abs=1e-5)
    assert results["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    last = results["history"][-1]
    assert last["step"] == 200
    assert last["test_loss"] == pytest.approx(results["test_loss"], abs=1e-5)


def test_test_images_are_not_trained_on(run, files):
    """Other test images give the same weights but another loss."""
    write_images(files / "others", seed=1)
    for name in TRAINING:
        shutil.copy(files / "images" / name, files / "others")
    losses = []
    for name in ("images", "others"):
        command = [*SHORT, "--batch", 5 * COUNT, "--data-dir", name, "--out", f"of_{name}"]
        assert run(*command).returncode == 0
        card = runcard.read_json(files / f"of_{name}" / "card.json")
        losses.append(card["results"]["test_loss"])
    assert same_weights(weights(files / "of_images"), weights(files / "of_others"))
    assert losses[0] != losses[1]


def test_data_order_and_augmentation_depend_on_the_seed_not_the_attention(run, files, seen):
    """For a fair comparison, every attention sees the same augmented images."""
    for flags in ([], ["--attention", "softmax"], ["--seed", "2"]):
        assert run(*SHORT, *flags).returncode == 0
    first, softmax, other = (
        {name: calls[i : i + 3] for name, calls in seen.items()} for i in (0, 3, 6)
    )
    for name in seen:
        for step in range(3):
            assert torch.equal(first[name][step].images, softmax[name][step].images), name
            assert not torch.equal(first[name][step].images, other[name][step].images), name
    assert [call.numbers for call in first["augment"]] == [(1, 0), (1, 1), (1, 2)]
    assert [call.numbers for call in other["augment"]] == [(2, 0), (2, 1), (2, 2)]


def test_augmentation_shifts_by_the_flag_and_mirrors_photographs_but_not_digits(
    run, files, seen, few_digits
):
    """A mirrored ship is a ship; a mirrored 3 is not a digit."""
    assert run(*SHORT, "--shift", 2, "--out", "photographs").returncode == 0
    digits = ["--data", "synthetic", "--steps", 3, "--shift", 0]
    assert run(*FLAGS, *digits, "--out", "digits").returncode == 0
    options = [call.options for call in seen["augment"]]
    assert options == [{"shift": 2, "mirror": True}] * 3 + [{"shift": 0, "mirror": False}] * 3
    for chosen, augmented in zip(seen["shuffled_batch"][3:], seen["augment"][3:], strict=True):
        assert torch.equal(chosen.images, augmented.images)


def test_without_network_and_folder_the_stand_in_is_announced_and_named(run, files, few_digits):
    result = run(*FLAGS, "--steps", 2, "--out", "digits")
    assert result.returncode == 0, result.stderr
    assert "\nNO CIFAR-10: " in result.stdout
    assert f"\n{synthetic.DIGITS_NAME}: 60 images to train on." in result.stdout
    assert f", on 30 images of {synthetic.DIGITS_NAME}. Most often" in result.stdout
    card = runcard.read_json(files / "digits" / "card.json")
    assert card["data"] == {"name": synthetic.DIGITS_NAME, "sha256": few_digits.sha256}
    assert sum(map(sum, card["results"]["confusion"])) == 30
    assert list((files / "cache" / "nala_min").iterdir()) == []
    imsave(files / "picture.png", np.zeros((32, 32)))
    assert (
        f" (trained on {synthetic.DIGITS_NAME})\n"
        in run("--out", "digits", "--predict", "picture.png", "--device", "cpu").stdout
    )


def test_requested_digits_are_not_announced_as_a_stand_in(run, files, few_digits):
    result = run(*FLAGS, "--steps", 1, "--data", "synthetic", "--out", "digits")
    assert result.returncode == 0
    assert "NO CIFAR-10" not in result.stdout and "Downloading" not in result.stdout
    assert f", on 30 images of {synthetic.DIGITS_NAME}. Most often" in result.stdout
    assert not (files / "cache").exists()


def test_an_attention_for_each_block_is_a_hybrid(run, files):
    result = run(*SHORT, "--layers", 2, "--attention", "nala,softmax")
    assert result.returncode == 0, result.stderr
    assert ", attention nala,softmax, " in result.stdout
    (folder,) = (files / "runs").iterdir()
    assert folder.name.startswith("cifar_cpu_nala-softmax_seed1_layers2_")
    assert runcard.read_json(folder / "card.json")["config"]["attention"] == "nala,softmax"
    tested = run("--out", folder, "--eval", "--data-dir", "images", "--device", "cpu")
    assert tested.returncode == 0
    assert tested.stdout in result.stdout


# --- Testing, predicting, resuming, help ---------------------------------------------------------


def test_eval_prints_what_the_run_printed_from_a_checkpoint_alone(run, files, trained):
    """It writes nothing. The sizes come from the checkpoint, not from flags."""
    (files / "run" / "card.json").unlink()
    before = files_below(files)
    result = run("--out", "run", "--eval", "--data-dir", "images", "--device", "cpu")
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith("Test accuracy ") and result.stdout.count("\n") == 2
    assert result.stdout in trained.result.stdout
    assert files_below(files) == before


def test_eval_on_images_of_other_classes_is_refused(run, files, few_digits):
    result = run("--out", "run", "--eval", "--data", "synthetic", "--device", "cpu")
    assert_mistake(result, train_cifar, "--eval")
    assert result.stdout == ""


def test_a_missing_checkpoint_is_noticed_before_any_download(run, files):
    result = run("--out", "nowhere", "--eval", "--device", "cpu")
    assert_mistake(result, train_cifar, "--out")
    assert result.stdout == ""


@pytest.mark.parametrize("kind", [0, 9])
def test_predict_names_the_class_of_a_large_picture_without_any_images(
    kind, run, files, monkeypatch
):
    """Of a wide picture, the middle is classified."""
    monkeypatch.delattr(data, "load_images")
    wide = np.zeros((96, 200))
    wide[:, 52:148] = stripes(kind, 0.4, side=96)
    imsave(files / "wide.png", wide, cmap="gray")
    before = files_below(files)
    result = run("--out", "run", "--predict", "wide.png", "--device", "cpu")
    assert result.returncode == 0 and result.stderr == ""
    name, pattern = "wide.png", r"(\w+) (\d+)%, (\w+) (\d+)%, (\w+) (\d+)%"
    match = re.fullmatch(rf"{name}: {pattern} \(trained on (.+)\)\n", result.stdout)
    assert match, result.stdout
    first, *shares = match[1], *map(int, match.group(2, 4, 6))
    assert first == data.CIFAR10_CLASSES[kind]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 101
    assert len({match[1], match[3], match[5]}) == 3
    assert match[7] == FROM_FOLDER
    assert files_below(files) == before


def test_a_finished_run_resumes_without_training(run, files, trained, seen):
    result = run(*FLAGS, "--data-dir", "images", "--out", "run", "--resume")
    assert result.returncode == 0
    assert seen["shuffled_batch"] == []
    tested = run("--out", "run", "--eval", "--data-dir", "images", "--device", "cpu").stdout
    assert tested in result.stdout and tested in trained.result.stdout
    card = runcard.read_json(files / "run" / "card.json")
    assert card["results"] == trained.card["results"]
    assert card["command"].endswith("--resume")


@pytest.mark.parametrize("stop", [5, 8])
def test_an_interrupted_run_resumes_bit_for_bit(stop, run, files, monkeypatch):
    """Also with dropout, between two checkpoints."""
    original, command = data.shuffled_batch, [*SHORT, "--steps", 21, "--dropout", 0.25]

    def until_stop(*arguments):
        if arguments[-1] == stop:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    whole = run(*command, "--out", "whole")
    monkeypatch.setattr(data, "shuffled_batch", until_stop)
    broken = run(*command, "--out", "parts")
    assert broken.returncode == 130
    line = f"train_cifar.py: interrupted: --resume continues from step {stop + 1}\n"
    assert broken.stderr.endswith(line)
    assert [path.name for path in (files / "parts").iterdir()] == ["checkpoint.pt"]
    monkeypatch.setattr(data, "shuffled_batch", original)
    rest = run(*command, "--out", "parts", "--resume")
    assert whole.returncode == rest.returncode == 0
    assert same_weights(weights(files / "whole"), weights(files / "parts"))
    one, other = (runcard.read_json(files / name / "card.json") for name in ("whole", "parts"))
    assert one["results"] == other["results"]


def test_help_names_every_flag(run):
    result = run("--help")
    assert result.returncode == 0 and result.stderr == ""
    for field in dataclasses.fields(train_cifar.Settings):
        name = field.name.replace("_", "-")
        assert re.search(rf"^  --{name} ", result.stdout, re.MULTILINE), name


# --- Mistakes of a user --------------------------------------------------------------------------

RUN = ["--out", "run"]
OF_TEXT = ["--out", "of_text"]
MISTAKES = {
    "a folder that is missing": (["--data-dir", "nowhere"], "--data-dir"),
    "a file in place of a folder": (["--data-dir", "text.txt"], "text.txt"),
    "a truncated file": (["--data-dir", "truncated"], "data_batch_5.bin"),
    "a patch that is no power of 2": (["--patch", "3"], "--patch"),
    "two sources of images": (["--data", "synthetic"], "--data synthetic"),
    "a batch larger than the data": (["--batch", str(5 * COUNT + 1)], "--batch"),
    "a picture that is missing": ([*RUN, "--predict", "nowhere.png"], "--predict nowhere.png"),
    "a picture that is no PNG": ([*RUN, "--predict", "text.txt"], "--predict text.txt"),
    "a picture that is cut off": ([*RUN, "--predict", "cut.png"], "--predict cut.png"),
    "a folder in place of a picture": ([*RUN, "--predict", "images"], "--predict images"),
    "a picture without a checkpoint": (["--predict", "whole.png"], "--out"),
    "a picture with a text model": ([*OF_TEXT, "--predict", "whole.png"], "of_text"),
    "a test without a checkpoint": (["--eval"], "--out"),
    "a test of a garbage checkpoint": (["--out", "garbage", "--eval"], "garbage"),
    "a test of a text model": ([*OF_TEXT, "--eval"], "of_text"),
    "no checkpoint to resume": (["--resume"], "--out"),
    "another patch to resume": ([*RUN, "--patch", "2", "--resume"], "patch = 4, not 2"),
    "other images to resume": ([*RUN, "--data-dir", "others", "--resume"], "data = "),
    "a text model to resume": ([*OF_TEXT, "--resume"], "of_text"),
    "a file in place of the run's folder": (["--out", "text.txt"], "text.txt"),
}


@pytest.fixture
def bad_files(files):
    """files, plus those that only mistakes use."""
    for name in ("missing", "truncated", "labels"):
        shutil.copytree(files / "images", files / name)
    (files / "missing" / "data_batch_2.bin").unlink()
    for name, change in {
        "truncated/data_batch_5.bin": lambda content: content[:-1],
        "labels/test_batch.bin": lambda content: b"\x0a" + content[1:],
    }.items():
        (files / name).write_bytes(change((files / name).read_bytes()))
    write_images(files / "others", seed=1)
    for name in ("garbage", "of_text"):
        (files / name).mkdir()
    (files / "garbage" / "checkpoint.pt").write_bytes(b"garbage\n")
    (files / "text.txt").write_text("To be, or not to be", encoding="utf-8")
    imsave(files / "whole.png", np.eye(32))
    whole = (files / "whole.png").read_bytes()
    (files / "cut.png").write_bytes(whole[: len(whole) // 2])
    sizes = {"layers": 1, "heads": 2, "dim": 16, "block": 8, "dropout": 0.0}
    model = NaLaLM(Config(vocab_size=2, num_layers=1, num_heads=2, dim=16))
    extra = sizes | {"attention": "nala", "characters": "ab", "data": {"name": "text.txt"}}
    saved = {"format": train.FORMAT, "model": model.state_dict(), "extra": extra}
    torch.save(saved, files / "of_text" / "checkpoint.pt")
    return files


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_flag_or_file(mistake, run, bad_files):
    flags, named = MISTAKES[mistake]
    before = files_below(bad_files)
    result = run(*FLAGS, "--data-dir", "images", "--out", "new", *flags)
    assert_mistake(result, train_cifar, named)
    assert files_below(bad_files) == before


def test_a_mistake_leaves_the_process_with_one_line_and_no_traceback(tmp_path):
    result = run_process(train_cifar, tmp_path, *FLAGS, "--data-dir", "nowhere")
    assert_mistake(result, train_cifar, "--data-dir needs CIFAR-10's binary version")
    assert result.stdout == ""
