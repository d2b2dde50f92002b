"""Data for the training scripts: find it, download and verify it, stand in for it, cut batches."""

from __future__ import annotations

import hashlib
import http.client
import os
import pydoc_data.topics
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SHAKESPEARE = "Tiny Shakespeare"
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
STAND_IN = "Python manual (stand-in)"


@dataclass(frozen=True)
class Text:
    """A text and what to call it in a result."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


def cache_dir() -> Path:
    """Folder for downloads, shared by every checkout: $XDG_CACHE_HOME or ~/.cache, /nala_min."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nala_min"


def load_text(
    path: Path | None = None,
    *,
    url: str = SHAKESPEARE_URL,
    sha256: str = SHAKESPEARE_SHA256,
    announce: Callable[[str], None] = print,
) -> Text:
    """The text of path; without one Tiny Shakespeare, cached or downloaded; without a network the
    Python manual, announced as a stand-in.

    Raises OSError if path cannot be read and ValueError if it is not UTF-8 text.
    """
    if path is not None:
        text = path.read_bytes().decode("utf-8")
        same = hashlib.sha256(text.encode("utf-8")).hexdigest() == sha256
        return Text(SHAKESPEARE if same else path.name, text)
    cached = cache_dir() / "tinyshakespeare.txt"
    try:
        if not (cached.exists() and _sha256(cached) == sha256):
            announce(f"Downloading {SHAKESPEARE} from {url}")
            download(url, cached, sha256)
        return Text(SHAKESPEARE, cached.read_bytes().decode("utf-8"))
    except (OSError, ValueError, http.client.HTTPException) as error:
        announce(
            f"NO SHAKESPEARE: {error}\n"
            f"Training on a stand-in instead, the {STAND_IN}; its loss is not comparable with"
            " Shakespeare's. Give a text of your own with --data FILE."
        )
        return Text(
            STAND_IN, "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
        )


def download(url: str, path: Path, sha256: str, timeout: float = 20.0) -> None:
    """Fetch url into path, which appears only whole and only if its SHA-256 is the expected one.

    timeout: seconds without an answer. Raises OSError or http.client.HTTPException if the transfer
    fails, ValueError if the bytes are not the expected ones.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response, part.open("wb") as file:
            while block := response.read(1 << 16):
                file.write(block)
        found = _sha256(part)
        if found != sha256:
            raise ValueError(f"{url} has SHA-256 {found}, not the expected {sha256}")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Vocabulary:
    """Characters <-> integers, in sorted order of the characters."""

    characters: str

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> Tensor:
        """Integers (N,) of text. Raises ValueError that names characters never seen."""
        index = {character: i for i, character in enumerate(self.characters)}
        unknown = sorted(set(text) - index.keys())
        if unknown:
            raise ValueError(f"{''.join(unknown)!r} does not occur in the text trained on")
        return torch.tensor([index[character] for character in text], dtype=torch.long)  # (N,)

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.characters[i] for i in tokens.tolist())


def split_text(text: str, block_size: int) -> tuple[Vocabulary, Tensor, Tensor]:
    """The vocabulary of a text, and its first nine tenths and its last tenth as integers.

    Raises ValueError if either part is too short for a window of block_size and its target.
    """
    tokens = (vocabulary := Vocabulary.of(text)).encode(text)
    cut = len(tokens) * 9 // 10
    if len(tokens) - cut <= block_size:
        raise ValueError(
            f"{len(tokens):,} characters are too few for windows of {block_size}: give more than"
            f" {10 * block_size:,}, or smaller windows"
        )
    return vocabulary, tokens[:cut], tokens[cut:]


def random_windows(
    tokens: Tensor, block_size: int, batch_size: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets, both (batch_size, block_size), at random places.

    A function of (seed, step) alone: every model sees the same data in the same order, and a
    resumed run goes on with the batch it would have seen.
    """
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - block_size, batch_size)
    windows = tokens[torch.from_numpy(starts)[:, None] + torch.arange(block_size + 1)]
    return windows[:, :-1], windows[:, 1:]


def all_windows(
    tokens: Tensor, block_size: int, batch_size: int, every: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of consecutive windows that cover tokens once; every n-th window only."""
    count = (len(tokens) - 1) // block_size
    inputs = tokens[: count * block_size].view(count, block_size)[::every]
    targets = tokens[1 : count * block_size + 1].view(count, block_size)[::every]
    yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
