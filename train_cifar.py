"""Train an image classifier with norm-aware linear attention on CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nala_min import Config, NaLaViT, data, distributed, measure, plots, runcard, train
from nala_min.flags import UsageError, flag, parse_flags, run_script
from nala_min.measure import smoothed_loss

# fmt: off
PRESETS = {
    "cpu": dict(layers=3, heads=4, dim=64, patch=4, batch=32, steps=2500, lr=2e-3, muon=0.02,
                weight_decay=0.02, dropout=0.0, shift=0),
    "gpu": dict(layers=7, heads=6, dim=192, patch=2, batch=256, steps=7000, lr=2e-3, muon=0.02,
                weight_decay=0.1, dropout=0.0, shift=4),
}
# fmt: on
CURVE_TEST_IMAGES = 1000  # test images per point of the curve; the final result uses all of them


@dataclass
class Settings(train.Settings):
    """Train an image classifier with norm-aware linear attention on CIFAR-10. By default, it takes
    under 5 minutes on 2 CPU cores. Writes a checkpoint, a run card and pictures (curve,
    attention maps) to --out."""

    NAME = "cifar"
    PRESETS = PRESETS
    CAUSAL = False

    data: str = flag(
        "cifar10", "training images", choices=["cifar10", "synthetic"], affects_result=False
    )
    data_dir: Path | None = flag(
        None, "folder with cifar-10-batches-bin (default: download)", affects_result=False
    )
    eval: bool = flag(False, "do not train: test the checkpoint", affects_result=False)
    predict: Path | None = flag(
        None, "do not train: classify this picture with the checkpoint", affects_result=False
    )
    patch: int | None = flag(None, "side of a patch, in pixels", (1, 2, 4, 8, 16, 32))
    shift: int | None = flag(None, "largest augmentation shift, in pixels", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data == "synthetic" and self.data_dir is not None:
            raise UsageError("--data synthetic and --data-dir are mutually exclusive")


def build_model(config: dict[str, Any]) -> NaLaViT:
    """The model described by a run's config."""
    return NaLaViT(Config(patch_size=config["patch"], **train.block_options(config)))


def load_model(settings: Settings, device: torch.device) -> tuple[NaLaViT, dict[str, Any]]:
    """The model of an earlier run, and the run's description."""
    saved = train.load_run(settings, "patch", "classes")
    model = build_model(saved["extra"]).to(device)
    model.load_state_dict(saved["model"])
    return model, saved["extra"]


def load_images(settings: Settings) -> data.Images:
    """The images selected by the flags."""
    if settings.data == "synthetic":
        return data.drawn_images()
    try:
        with distributed.local_rank_0_first():
            return data.load_images(settings.data_dir)
    except (OSError, ValueError) as error:
        raise UsageError(f"--data-dir needs CIFAR-10's binary version: {error}") from error


def predict(model: NaLaViT, run: dict[str, Any], path: Path) -> None:
    """Print the three most likely classes of the picture at path."""
    try:
        image = data.read_picture(path)
    except Exception as error:  # Pillow raises many types for a damaged file
        raise UsageError(f"--predict {path}: {error}") from error
    probs, classes = measure.classify(model, image[None])[0].softmax(dim=0).topk(3)
    pairs = zip(probs.tolist(), classes.tolist(), strict=True)
    names = (f"{run['classes'][i]} {share:.0%}" for share, i in pairs)
    print(f"{path}: {', '.join(names)} (trained on {run['data']['name']})")


def test(model: NaLaViT, images: data.Images) -> dict[str, Any]:
    """Evaluate on all test images. Print a summary; return the numbers and the confusion matrix."""
    numbers = measure.score(logits := measure.classify(model, images.test[0]), images.test[1])
    count = len(images.classes)
    pairs = count * images.test[1] + logits.argmax(dim=1)
    confusion = torch.bincount(pairs, minlength=count**2).view(count, count)  # (true, predicted)
    print(
        f"Test accuracy {numbers['test_accuracy']:.2%}, loss {numbers['test_loss']:.4f}, on"
        f" {len(logits):,} images of {images.name}. Most often confused:"
    )
    mistakes = (confusion + confusion.T).triu(1).flatten()  # of each pair, in either direction
    for pair in mistakes.argsort(descending=True, stable=True)[:3].tolist():
        if mistakes[pair] > 0:
            first, second = (images.classes[i] for i in divmod(pair, count))
            print(f"  {first} and {second}: {mistakes[pair]} times")
    return numbers | {"confusion": confusion.tolist()}


def draw(model: NaLaViT, images: data.Images, results: dict[str, Any], title: str, out: Path):
    """Plot the curve and the attention maps of four test images."""
    plots.write(plots.curve(results["history"], title), out / "curve.png")
    maps = measure.attention_maps(model, shown := images.test[0][:4])
    trained_with = plots.display_name(model.config.attentions[-1])
    plots.write(plots.attention_maps(shown, maps, trained_with), out / "maps.png")


def main() -> None:
    settings = parse_flags(Settings)
    device = train.choose_device(settings.device)
    if settings.predict is not None:
        return predict(*load_model(settings, device), settings.predict)
    if settings.eval:
        model, run = load_model(settings, device)
        if list((images := load_images(settings)).classes) != run["classes"]:
            raise UsageError(
                f"--eval: the run in {settings.out} was trained on {run['data']['name']}, which has"
                " other classes"
            )
        test(model, images)
        return

    images = load_images(settings)
    if settings.batch > len(images.train[0]):
        raise UsageError(
            f"--batch must be at most {len(images.train[0]):,}, the number of training images,"
            f" got {settings.batch}"
        )
    torch.manual_seed(settings.seed)
    model = build_model(settings.config()).to(device, memory_format=torch.channels_last)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    description = f"attention {settings.attention}, {parameters:,} parameters"
    data_info = {"name": images.name, "sha256": images.sha256}
    print(
        f"{images.name}: {len(images.train[0]):,} images to train on."
        f" NaLaViT on {device}, {description}."
    )
    print(runcard.expected("cifar_*.json", settings.config(), images.sha256, "test_accuracy"))
    pictures, labels = (tensor.to(device) for tensor in images.train)
    seed, curve_set = settings.seed, [tensor[:CURVE_TEST_IMAGES] for tensor in images.test]

    def batch(step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = data.shuffled_batch(pictures, labels, settings.batch, seed, step)
        inputs = data.augment(inputs, seed, step, shift=settings.shift, mirror=images.mirror)
        return data.normalise(inputs), targets

    history, seconds = train.fit(
        model,
        settings.recipe(device),
        batch=batch,
        loss=smoothed_loss,
        evaluate=lambda model: measure.score(measure.classify(model, curve_set[0]), curve_set[1]),
        checkpoint=settings.out / "checkpoint.pt",
        extra=settings.config() | {"data": data_info, "classes": list(images.classes)},
        resume=settings.resume,
        compile=settings.compile,
    )
    if distributed.rank() > 0:  # only the first process has the results
        return
    results = test(model, images) | {"parameters": parameters, "history": history}
    card = runcard.run_card(settings.config(), data_info, device, seconds, results)
    runcard.write_json(settings.out / "card.json", card)  # saved before steps that need more memory
    results["attention_stats"] = measure.attention_stats(model, images.test[0][:100])
    runcard.write_json(settings.out / "card.json", card)
    draw(model, images, results, f"{description}, seed {seed}", settings.out)
    print(f"{seconds:.0f} s of training. Checkpoint, run card and pictures: {settings.out}")


if __name__ == "__main__":
    run_script(main)
