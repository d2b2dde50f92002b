"""Data for the training scripts: find, download, verify and batch it."""

import hashlib
import http.client
import os
import tarfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from nala_min.synthetic import DIGITS_NAME, FONTS, MANUAL_NAME, drawn_digits, python_manual

Pair = tuple[Tensor, Tensor]  # inputs and targets, or images and labels

# --- Downloads ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A file to download, with its checksum."""

    name: str
    url: str
    file: str  # its name in the cache
    size: int  # bytes
    sha256: str

    def matches(self, path: Path | str) -> bool:
        """Whether the file at path has exactly this content."""
        if not Path(path).is_file() or Path(path).stat().st_size != self.size:
            return False
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() == self.sha256


SHAKESPEARE = Source(
    "Tiny Shakespeare",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "tinyshakespeare.txt",
    1_115_394,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
CIFAR10 = Source(
    "CIFAR-10",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "cifar-10-binary.tar.gz",
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)


def fetch(source: Source) -> Path:
    """The path of source in the cache, $XDG_CACHE_HOME/nala_min or ~/.cache/nala_min. Downloads it
    if it is missing, to FILE.part, where the next call resumes. Raises what _receive raises."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(cache, "nala_min", source.file)
    part = path.with_name(path.name + ".part")
    if source.matches(path):
        return path
    print(f"Downloading {source.name} ({source.size:,} bytes) from {source.url}.")
    print("Ctrl-C stops, the next run resumes. --help names other sources.")
    path.parent.mkdir(parents=True, exist_ok=True)
    while not source.matches(path):  # another process may be faster
        if source.matches(part):
            part.replace(path)
        else:
            _receive(source, part)
    part.unlink(missing_ok=True)
    return path


def _receive(source: Source, part: Path) -> None:
    """Append to part what arrives of source. Raises OSError if nothing does, ValueError if part has
    wrong bytes, which it deletes, or the answer another size."""
    start = part.stat().st_size if part.exists() else 0
    if start >= source.size:
        part.unlink()
        raise ValueError(f"{source.url} gave another SHA-256: the download was deleted")
    received, failure = start, "the connection closed"
    request = urllib.request.Request(source.url, headers={"Range": f"bytes={start}-"})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            if response.status == http.HTTPStatus.OK:  # the whole file, from its start
                received = 0
            if response.length != source.size - received:  # such as a login page
                raise ValueError(f"{source.url} has {response.length} bytes")
            bytes_of = {"total": source.size, "initial": received, "unit": "B", "unit_scale": True}
            part.touch()
            with tqdm(desc=source.name, **bytes_of) as bar, part.open("r+b") as file:
                file.seek(received)
                while block := response.read(1 << 16):
                    received += file.write(block)
                    bar.update(len(block))
    except (OSError, http.client.HTTPException) as error:
        failure = str(error)  # an HTTPError that is kept would keep its connection open
    if received <= start:
        raise OSError(f"{source.url} sent nothing after {start:,} bytes ({failure})")


# --- Text -----------------------------------------------------------------------------------------


class Text(NamedTuple):
    """A text and its name in results."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


def load_text(path: Path | str | None = None) -> Text:
    """The text at path, by default Tiny Shakespeare or, if it cannot be downloaded, the Python
    manual, after a notice. Raises OSError, or ValueError if path is not UTF-8 text."""
    if path is None:
        try:
            path = fetch(SHAKESPEARE)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home directory
            print(f"NO SHAKESPEARE: {error}\nTraining on the {MANUAL_NAME}: not comparable.")
            return Text(MANUAL_NAME, python_manual())
    name = SHAKESPEARE.name if SHAKESPEARE.matches(path) else Path(path).name
    return Text(name, Path(path).read_bytes().decode("utf-8"))


@dataclass(frozen=True)
class Vocabulary:
    """Maps characters, in sorted order, to integers and back."""

    characters: str

    def encode(self, text: str) -> Tensor:
        """text as integers (N,). Raises ValueError, naming the characters, if any are unknown."""
        index = {character: i for i, character in enumerate(self.characters)}
        if unknown := "".join(sorted(set(text) - index.keys())):
            raise ValueError(f"characters must occur in the training text, got {unknown!r}")
        return torch.tensor([index[c] for c in text], dtype=torch.long, device="cpu")  # (N,)

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.characters[i] for i in tokens.tolist())


def split_text(text: str, block_size: int) -> tuple[Vocabulary, Tensor, Tensor]:
    """The vocabulary of a text, and its first nine tenths and last tenth as integers. Raises
    ValueError if the last is too short for a window of block_size and its target."""
    vocabulary = Vocabulary("".join(sorted(set(text))))
    tokens = vocabulary.encode(text)
    cut = len(tokens) * 9 // 10
    if len(tokens) - cut <= block_size:
        raise ValueError(f"text must exceed {10 * block_size:,} characters, got {len(text):,}")
    return vocabulary, tokens[:cut], tokens[cut:]


def random_windows(tokens: Tensor, block_size: int, batch_size: int, seed: int, step: int) -> Pair:
    """Inputs and next-token targets, both (batch_size, block_size), at random positions that depend
    on (seed, step) alone: the same for every model and for a resumed run."""
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - block_size, batch_size)
    offsets = torch.arange(block_size + 1, device=tokens.device)
    windows = tokens[_to_device_of(tokens, starts)[:, None] + offsets]
    return windows[:, :-1], windows[:, 1:]


def all_windows(tokens: Tensor, block_size: int, batch_size: int, every: int = 1) -> Iterator[Pair]:
    """Batches of inputs and targets from consecutive windows, which cover tokens once. every=n
    keeps only every n-th window."""
    count = (len(tokens) - 1) // block_size
    inputs = tokens[: count * block_size].view(count, block_size)[::every]
    targets = tokens[1 : count * block_size + 1].view(count, block_size)[::every]
    yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)


def _to_device_of(reference: Tensor, index: np.ndarray) -> Tensor:
    """index on the device of reference, without waiting for work queued on a CUDA card."""
    return torch.from_numpy(index).to(reference.device, non_blocking=reference.is_cuda)


# --- Images ---------------------------------------------------------------------------------------

CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
CIFAR10_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
IMAGES_PER_FILE = 10_000
BYTES_PER_IMAGE = 1 + 3 * 32 * 32  # label, then red, green and blue planes, row by row


@dataclass(frozen=True)
class Images:
    """Small colour images in 10 classes and their name in results."""

    name: str
    classes: tuple[str, ...]
    train: Pair  # images (n, 3, 32, 32) uint8 and labels (n,) int64
    test: Pair
    mirror: bool  # whether a mirrored image still shows its class

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all images and labels, training data first."""
        return hashlib.sha256(b"".join(x.numpy() for x in (*self.train, *self.test))).hexdigest()


def load_images(folder: Path | None = None) -> Images:
    """CIFAR-10's binary version from folder, or from the cache; if that cannot be filled, drawn
    digits, after a notice. Raises OSError or ValueError, naming a missing or corrupt file."""
    if folder is not None:
        below = Path(folder, "cifar-10-batches-bin")
        paths = [(below if below.is_dir() else Path(folder)) / name for name in CIFAR10_FILES]
        return _decode("CIFAR-10 (files in a folder)", {x: x.read_bytes() for x in paths})
    try:
        path = fetch(CIFAR10)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home directory
        print(f"NO CIFAR-10: {error}\nTraining on {DIGITS_NAME}: not comparable.")
        return drawn_images()
    with tarfile.open(path) as archive:  # its checksum is right; it is read, not extracted
        files = {Path(x.name).name: archive.extractfile(x).read() for x in archive if x.isfile()}
    return _decode("CIFAR-10", {name: files[name] for name in CIFAR10_FILES})


def drawn_images(num_train: int = 20_000, num_test: int = 4_000) -> Images:
    """Drawn digits, tested in other fonts. A mirror image of a digit is not that digit."""
    train = drawn_digits(num_train, range(12), seed=0)
    test = drawn_digits(num_test, range(12, len(FONTS)), seed=1)
    return Images(DIGITS_NAME, tuple("0123456789"), train, test, mirror=False)


def _decode(name: str, files: dict[Path | str, bytes]) -> Images:
    """Images from the contents of the six files. Checks their sizes and labels."""
    size = IMAGES_PER_FILE * BYTES_PER_IMAGE
    for path, content in files.items():
        if len(content) != size or max(content[::BYTES_PER_IMAGE]) > 9:
            raise ValueError(f"{path} is corrupt: it must have {size:,} bytes and labels up to 9")
    records = np.frombuffer(b"".join(files.values()), np.uint8).reshape(-1, BYTES_PER_IMAGE)
    images = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy())
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    cut = 5 * IMAGES_PER_FILE
    train, test = (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
    return Images(name, CIFAR10_CLASSES, train, test, mirror=True)


def shuffled_batch(images: Tensor, labels: Tensor, batch_size: int, seed: int, step: int) -> Pair:
    """Images and labels of one step, by (seed, step) alone. An epoch uses each of the at least
    batch_size examples at most once, in its own order."""
    epoch, i = divmod(step, len(images) // batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(len(images))
    index = _to_device_of(images, order[i * batch_size : (i + 1) * batch_size])
    return images[index], labels[index]


def augment(images: Tensor, seed: int, step: int, *, shift: int, mirror: bool) -> Tensor:
    """images (B, 3, height, width), each shifted at random, by (seed, step) alone, by up to shift
    pixels, with reflection at its edges. If mirror, half of them are flipped."""
    random = np.random.default_rng([seed, step, 1])
    sources = []  # of each row and of each column: (B, height), (B, width)
    for side in images.shape[2:]:
        index = np.arange(side) + random.integers(-shift, shift + 1, (len(images), 1))
        index %= (period := max(1, 2 * (side - 1)))
        sources.append(np.minimum(index, period - index))  # reflected at both ends
    rows, columns = sources
    if mirror:
        columns = np.where(random.random((len(images), 1)) < 0.5, columns[:, ::-1], columns)
    rows, columns = (_to_device_of(images, x) for x in (rows, columns))
    shifted = images.take_along_dim(rows[:, None, :, None], dim=2)
    return shifted.take_along_dim(columns[:, None, None, :], dim=3)


def normalise(images: Tensor) -> Tensor:
    """uint8 images as floats with about zero mean and unit variance on natural images. Raises
    TypeError for another dtype, such as floats from 0 to 1."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, from 0 to 255, got {images.dtype}")
    return (images.float() - 120) / 64


def read_picture(path: Path | str) -> Tensor:
    """The central square of a picture in any format of Pillow's, resized to (3, 32, 32) uint8.
    Transparent pixels become white. Raises what Pillow raises, which is any type."""
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)  # as the camera was held
    if picture.mode[0] in "IF":  # Pillow would clip larger numbers
        raise ValueError(f"it must have at most 8 bits per channel, got mode {picture.mode}")
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    opaque = Image.alpha_composite(white, picture).convert("RGB")
    small = ImageOps.fit(opaque, (32, 32), Image.Resampling.BILINEAR)  # averages, as it shrinks
    return torch.from_numpy(np.array(small)).movedim(2, 0)
