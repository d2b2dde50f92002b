"""Train a character-level language model with norm-aware linear attention on Tiny Shakespeare."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nala_min import Config, NaLaLM, data, distributed, measure, plots, runcard, train
from nala_min.flags import UsageError, flag, parse_flags, run_script
from nala_min.measure import next_token_loss, validation_loss

# fmt: off
PRESETS = {  # gpu: nanoGPT's sizes
    "cpu": dict(layers=4, heads=4, dim=96, block=128, batch=8, steps=3400, lr=4e-3, muon=0.02,
                weight_decay=0.02, dropout=0.0),
    "gpu": dict(layers=6, heads=6, dim=384, block=256, batch=64, steps=4000, lr=1e-3, muon=0.02,
                weight_decay=0.1, dropout=0.2),
}
# fmt: on


@dataclass
class Settings(train.Settings):
    """Train a character-level language model with norm-aware linear attention on Tiny Shakespeare,
    then sample from it. By default, it takes under 5 minutes on 2 CPU cores. Writes a checkpoint,
    a loss curve and a run card to --out."""

    NAME = "shakespeare"
    PRESETS = PRESETS

    data: Path | None = flag(None, "UTF-8 text (default: Tiny Shakespeare)", affects_result=False)
    sample: int | None = flag(
        None,
        "do not train: generate this many characters from the checkpoint",
        affects_result=False,
    )
    prompt: str = flag("", "start of the sample (default: a newline)", affects_result=False)
    block: int | None = flag(
        None, "characters per training window; longer ones shrink the batch, then the steps"
    )

    def defaults(self) -> dict[str, Any]:
        """The preset's values. Longer windows shrink the batch and, once it is a single window, the
        number of steps. The total number of characters stays about the same."""
        preset = super().defaults()
        if (self.block or 0) <= preset["block"]:
            return preset
        characters = preset["batch"] * preset["block"]
        batch = max(1, characters // self.block)
        steps = max(1, preset["steps"] * characters // (batch * self.block))
        return preset | {"batch": batch, "steps": steps}


def build_model(config: dict[str, Any], vocabulary: data.Vocabulary) -> NaLaLM:
    """The model described by a run's config."""
    return NaLaLM(Config(vocab_size=len(vocabulary.characters), **train.block_options(config)))


def generate_text(
    model: NaLaLM, vocabulary: data.Vocabulary, prompt: Tensor, length: int, seed: int
) -> str:
    """prompt (1, N), continued by length characters, as text."""
    prompt = prompt.to(model.norm.weight.device)
    return vocabulary.decode(model.generate(prompt, length, temperature=0.8, seed=seed)[0])


def encode_prompt(vocabulary: data.Vocabulary, prompt: str) -> Tensor:
    """prompt as integers (1, N). An empty prompt becomes the vocabulary's first character, which is
    a newline in most texts."""
    try:
        return vocabulary.encode(prompt or vocabulary.characters[0])[None]
    except ValueError as error:
        raise UsageError(f"--prompt: {error}") from error


def sample(settings: Settings, device: torch.device) -> None:
    """Print a sample from the checkpoint of an earlier run."""
    saved = train.load_run(settings, "characters")
    vocabulary = data.Vocabulary(saved["extra"]["characters"])
    prompt = encode_prompt(vocabulary, settings.prompt)
    model = build_model(saved["extra"], vocabulary).to(device)
    model.load_state_dict(saved["model"])
    print(f"{settings.out}, step {saved['step']}:", file=sys.stderr)
    print(generate_text(model, vocabulary, prompt, settings.sample, settings.seed))


def main() -> None:
    settings = parse_flags(Settings)
    device = train.choose_device(settings.device)
    if settings.sample is not None:
        return sample(settings, device)

    try:
        with distributed.local_rank_0_first():
            text = data.load_text(settings.data)
        vocabulary, training, validation = data.split_text(text.text, settings.block)
    except (OSError, ValueError) as error:
        raise UsageError(f"--data {settings.data or ''}: {error}") from error
    prompt = encode_prompt(vocabulary, settings.prompt)
    torch.manual_seed(settings.seed)
    model = build_model(settings.config(), vocabulary).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    data_info = {"name": text.name, "sha256": text.sha256, "characters": len(text.text)}
    print(
        f"{text.name}: {len(text.text):,} characters, {len(vocabulary.characters)} distinct."
        f" NaLaLM, attention {settings.attention}: {parameters:,} parameters on {device}."
    )
    print(runcard.expected("shakespeare_*.json", settings.config(), text.sha256, "validation_loss"))

    training = training.to(device)  # a GPU cuts its own windows
    history, seconds = train.fit(
        model,
        settings.recipe(device),
        batch=lambda step: data.random_windows(
            training, settings.block, settings.batch, settings.seed, step
        ),
        loss=next_token_loss,
        evaluate=lambda model: {
            "validation_loss": validation_loss(model, validation, settings.block, every=4)
        },
        checkpoint=settings.out / "checkpoint.pt",
        extra=settings.config() | {"data": data_info, "characters": vocabulary.characters},
        resume=settings.resume,
        compile=settings.compile,
    )
    if distributed.rank() > 0:  # only the first process has the results
        return
    loss = validation_loss(model, validation, settings.block)
    results = {"validation_loss": loss, "parameters": parameters, "history": history}
    card = runcard.run_card(settings.config(), data_info, device, seconds, results)
    runcard.write_json(settings.out / "card.json", card)  # saved before steps that need more memory
    inputs, _ = next(data.all_windows(validation, settings.block, 64))
    results["attention_stats"] = measure.attention_stats(model, inputs)
    results["sample"] = generate_text(model, vocabulary, prompt, 500, settings.seed)
    runcard.write_json(settings.out / "card.json", card)
    title = f"attention {settings.attention}, {parameters:,} parameters, seed {settings.seed}"
    plots.write(plots.curve(history, title), settings.out / "curve.png")
    print(
        f"Validation loss {loss:.4f} nats per character on the last tenth of {text.name}, after"
        f" {seconds:.0f} s of training. Checkpoint, curve and run card: {settings.out}"
    )
    print(results["sample"])


if __name__ == "__main__":
    run_script(main)
