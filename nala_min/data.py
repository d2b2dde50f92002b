"""Data for the training scripts: find, download, verify and batch it."""

from __future__ import annotations

import hashlib
import http.client
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nala_min.synthetic import DIGITS_NAME, MANUAL_NAME, drawn_digits, python_manual

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
        path = Path(path)
        return (
            path.is_file() and path.stat().st_size == self.size and self.hash(path) == self.sha256
        )

    @staticmethod
    def hash(path: Path | str) -> str:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


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

# The exceptions that download raises.
DOWNLOAD_ERRORS = (OSError, ValueError, http.client.HTTPException)


def cache_dir() -> Path:
    """The download folder: $XDG_CACHE_HOME/nala_min, by default ~/.cache/nala_min. Without a home
    directory, nala_min in the system's temporary directory."""
    if not (cache := os.environ.get("XDG_CACHE_HOME")):
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:  # no HOME and no passwd entry, as in many containers
            cache = tempfile.gettempdir()
    return Path(cache) / "nala_min"


def fetch(source: Source, hint: str = "") -> Path:
    """The path of source in the cache. If the file is missing, downloads it first and prints a
    notice that ends in hint.

    Raises the same errors as download.
    """
    path = cache_dir() / source.file
    if not source.matches(path):
        print(f"Downloading {source.name} ({source.size:,} bytes) from {source.url}{hint}")
        download(source, path)
    return path


def download(source: Source, path: Path | str, timeout: float = 20.0) -> None:
    """Download source to path. The file appears only once it is complete and its SHA-256 matches.

    Shows progress, speed and time left. A broken transfer is resumed as long as each attempt brings
    more data. Partial data stays in path.part for the next call. timeout: seconds to wait for a
    response.

    Raises OSError or http.client.HTTPException if the transfer fails. Raises ValueError, and
    deletes the data, if the content is wrong.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.touch()
    try:
        with part.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            _transfer(source, file, timeout)
    finally:
        if part.exists() and part.stat().st_size == 0:
            part.unlink()
    if source.matches(path):  # another process was faster, and wrote the same bytes
        part.unlink(missing_ok=True)
        return
    if not source.matches(part):
        found = f"{part.stat().st_size:,} bytes with SHA-256 {source.hash(part)}"
        part.unlink()
        raise ValueError(
            f"{source.url} gave {found}, not {source.size:,} bytes with {source.sha256}:"
            " the download was deleted"
        )
    os.replace(part, path)


def _transfer(source, file, timeout):
    """Append the missing rest of source to file."""
    with tqdm(
        desc=source.name, total=source.size, initial=file.tell(), unit="B", unit_scale=True
    ) as bar:
        while (received := file.tell()) < source.size:
            request = urllib.request.Request(source.url)
            if received:
                request.add_header("Range", f"bytes={received}-")
            error = ConnectionError(f"{source.url} stopped sending after {received:,} bytes")
            try:
                with urllib.request.urlopen(request, timeout=timeout) as response:
                    if response.status != http.HTTPStatus.PARTIAL_CONTENT:  # starts over
                        length = int(response.headers.get("Content-Length", source.size))
                        if length != source.size:  # such as a login page
                            raise ValueError(
                                f"{source.url} has {length:,} bytes, not {source.size:,}"
                            )
                        file.seek(0)
                        bar.reset()
                    while file.tell() <= source.size and (block := response.read(1 << 16)):
                        file.write(block)
                        bar.update(len(block))
            except (OSError, http.client.HTTPException) as failure:
                error = failure
                if isinstance(failure, urllib.error.HTTPError):
                    failure.close()
            if file.tell() <= received:
                raise error


# --- Text -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A text and its name in results."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """SHA-256 of its UTF-8 bytes."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


def load_text(path: Path | str | None = None, *, source: Source = SHAKESPEARE) -> Text:
    """The text at path. Without path: Tiny Shakespeare, from the cache or downloaded. If the
    download fails, returns the Python manual as a stand-in and prints a notice.

    Raises OSError if path cannot be read, and ValueError if it is not UTF-8 text.
    """
    if path is not None:
        path = Path(path)
        name = source.name if source.matches(path) else path.name
        return Text(name, path.read_bytes().decode("utf-8"))
    try:
        return Text(source.name, fetch(source).read_bytes().decode("utf-8"))
    except DOWNLOAD_ERRORS as error:
        print(
            f"NO SHAKESPEARE: {error}\n"
            f"Training on the {MANUAL_NAME} instead. Its loss is not comparable with Shakespeare's."
            " Use --data FILE to train on your own text."
        )
        return Text(MANUAL_NAME, python_manual())


@dataclass(frozen=True)
class Vocabulary:
    """Maps characters, in sorted order, to integers and back."""

    characters: str

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> Tensor:
        """text as integers (N,). Raises ValueError, naming the characters, if any are unknown."""
        index = {character: i for i, character in enumerate(self.characters)}
        unknown = sorted(set(text) - index.keys())
        if unknown:
            raise ValueError(
                f"characters must occur in the training text, got {''.join(unknown)!r}"
            )
        return torch.tensor([index[c] for c in text], dtype=torch.long, device="cpu")  # (N,)

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.characters[i] for i in tokens.tolist())


def split_text(text: str, block_size: int) -> tuple[Vocabulary, Tensor, Tensor]:
    """The vocabulary of a text, and its first nine tenths and last tenth as integers.

    Raises ValueError if either part is too short for a window of block_size and its target.
    """
    tokens = (vocabulary := Vocabulary.of(text)).encode(text)
    cut = len(tokens) * 9 // 10
    if len(tokens) - cut <= block_size:
        raise ValueError(
            f"the text must be longer than {10 * block_size:,} characters for windows of"
            f" {block_size}, got {len(tokens):,}: use more text or smaller windows"
        )
    return vocabulary, tokens[:cut], tokens[cut:]


def random_windows(
    tokens: Tensor, block_size: int, batch_size: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets, both (batch_size, block_size), at random positions.

    The result depends on (seed, step) alone: every model sees the same data in the same order, and
    a resumed run sees the same batches as an uninterrupted one.
    """
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - block_size, batch_size)
    offsets = torch.arange(block_size + 1, device=tokens.device)
    windows = tokens[_to_device_of(torch.from_numpy(starts), tokens)[:, None] + offsets]
    return windows[:, :-1], windows[:, 1:]


def all_windows(
    tokens: Tensor, block_size: int, batch_size: int, every: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of inputs and targets from consecutive windows, which cover tokens once. every=n
    keeps only every n-th window."""
    count = (len(tokens) - 1) // block_size
    inputs = tokens[: count * block_size].view(count, block_size)[::every]
    targets = tokens[1 : count * block_size + 1].view(count, block_size)[::every]
    yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)


# --- Images ---------------------------------------------------------------------------------------

CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
CIFAR10_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
IMAGES_PER_FILE = 10_000
BYTES_PER_IMAGE = 1 + 3 * 32 * 32  # label, then red, green and blue planes, row by row
SLOW_HOST_HINT = (
    ".\nSince June 2026 this host has served only 50 to 80 kB/s, so this may take an hour. Press"
    " Ctrl-C to stop; the next run resumes the download.\nAlternatives: --url MIRROR, --data-dir"
    " FOLDER (with the archive or its files), or --data synthetic (digits drawn on this machine)."
)


@dataclass(frozen=True)
class Images:
    """Small colour images in 10 classes and their name in results."""

    name: str
    classes: tuple[str, ...]
    train: tuple[Tensor, Tensor]  # images (n, 3, 32, 32) uint8 and labels (n,) int64
    test: tuple[Tensor, Tensor]
    mirror: bool  # whether a mirrored image still shows its class

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all images and labels, training data first."""
        digest = hashlib.sha256()
        for tensor in (*self.train, *self.test):
            digest.update(tensor.numpy())
        return digest.hexdigest()


def load_images(
    name: str = "cifar10",
    folder: Path | str | None = None,
    url: str | None = None,
    *,
    source: Source = CIFAR10,
) -> Images:
    """CIFAR-10 from folder, else from the cache, else downloaded from url or its author's page. If
    the author's page fails, returns drawn digits as a stand-in and prints a notice.
    name="synthetic" returns drawn digits without a notice.

    Raises OSError or ValueError, naming the file or address, if the data in folder or at url is
    missing, truncated or corrupt.
    """
    if name == "synthetic":
        return drawn_images()
    if folder is not None:
        return _load_folder(Path(folder), source)
    try:
        mirrored = replace(source, url=url or source.url)
        return _decode(source.name, _read_archive(fetch(mirrored, "" if url else SLOW_HOST_HINT)))
    except DOWNLOAD_ERRORS as error:
        if url is not None:
            raise ValueError(str(error)) from error
        print(
            f"NO CIFAR-10: {error}\n"
            f"Training on {DIGITS_NAME} instead. The accuracy is not comparable with CIFAR-10's."
            " Use --data-dir or --url for another source."
        )
        return drawn_images()


def drawn_images(num_train: int = 20_000, num_test: int = 4_000) -> Images:
    """The drawn digits. They are not mirrored: a mirror image of a digit is not that digit."""
    train, test = drawn_digits(num_train, num_test)
    return Images(DIGITS_NAME, tuple("0123456789"), train, test, mirror=False)


def _load_folder(folder: Path, source: Source) -> Images:
    """CIFAR-10 from its extracted files in folder or in cifar-10-batches-bin below it, or from its
    archive in folder."""
    for location in (folder / "cifar-10-batches-bin", folder):
        if any((location / name).exists() for name in CIFAR10_FILES):
            files = {str(location / name): (location / name).read_bytes() for name in CIFAR10_FILES}
            return _decode(f"{source.name} (files in a folder)", files)
    archive = folder / source.file
    if not archive.exists():
        if not folder.is_dir():
            got = "a file" if folder.exists() else "nothing"
            raise ValueError(
                f"{folder} must be a folder with {source.file} or its files, got {got}"
            )
        for python_file in ("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1"):
            if (folder / python_file).exists():
                raise ValueError(
                    f"{folder / python_file} is the Python version of CIFAR-10: download the binary"
                    f" version, {source.file}, from {source.url}"
                )
        raise ValueError(
            f"{folder} has neither {source.file} nor its files, such as {CIFAR10_FILES[0]}"
        )
    if not source.matches(archive):
        raise ValueError(f"{archive} is corrupt or truncated: its SHA-256 is not {source.sha256}")
    return _decode(source.name, _read_archive(archive))


def _read_archive(path: Path) -> dict[str, bytes]:
    """The six files in an archive. It is never extracted, so no member can write to disk. A link in
    place of a file counts as missing."""
    found = {}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.isfile() and Path(member.name).name in CIFAR10_FILES:
                    found[Path(member.name).name] = archive.extractfile(member).read()
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a readable archive ({error})") from error
    return {f"{name} in {path}": found.get(name, b"") for name in CIFAR10_FILES}


def _decode(name: str, files: dict[str, bytes]) -> Images:
    """Images from the contents of the six files. Checks their sizes and labels."""
    decoded = []
    for path, content in files.items():
        if len(content) != IMAGES_PER_FILE * BYTES_PER_IMAGE:
            raise ValueError(
                f"{path} has {len(content):,} bytes, not {IMAGES_PER_FILE * BYTES_PER_IMAGE:,}:"
                " truncated or corrupt"
            )
        records = np.frombuffer(content, np.uint8).reshape(IMAGES_PER_FILE, BYTES_PER_IMAGE)
        if records[:, 0].max() >= len(CIFAR10_CLASSES):
            raise ValueError(f"{path} has a label above {len(CIFAR10_CLASSES) - 1}: corrupt")
        decoded.append(records)

    def tensors(records):
        images = records[:, 1:].reshape(-1, 3, 32, 32)
        return torch.from_numpy(images.copy()), torch.from_numpy(records[:, 0].astype(np.int64))

    *training, test = decoded
    return Images(name, CIFAR10_CLASSES, tensors(np.concatenate(training)), tensors(test), True)


def shuffled_batch(
    images: Tensor, labels: Tensor, batch_size: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Images and labels of one step. An epoch uses each example at most once, in its own order.

    The result depends on (seed, step) alone, as in random_windows. Raises ValueError if there are
    fewer than batch_size examples.
    """
    if batch_size > len(images):
        raise ValueError(
            f"batch_size must be at most {len(images):,}, the number of images, got {batch_size:,}"
        )
    epoch, i = divmod(step, len(images) // batch_size)
    order = _order_of_epoch(len(images), seed, epoch)
    index = _to_device_of(order[i * batch_size : (i + 1) * batch_size], images)
    return images[index], labels[index]


def _to_device_of(index: Tensor, reference: Tensor) -> Tensor:
    """Copy index to the device of reference, without waiting for work queued on a CUDA card."""
    return index.to(reference.device, non_blocking=reference.device.type == "cuda")


@lru_cache(maxsize=2)  # drawn once per epoch, not per step
def _order_of_epoch(count: int, seed: int, epoch: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(count))


def augment(images: Tensor, seed: int, step: int, *, shift: int, mirror: bool) -> Tensor:
    """Shift each image at random by up to shift pixels, with reflection at its edges. If mirror,
    flip each one with probability 1/2.

    images: (B, 3, height, width), on any device. The result depends on images, seed and step alone.
    """
    random = np.random.default_rng([seed, step, 1])
    count, channels, *sides = images.shape

    def source_indices(side: int) -> np.ndarray:
        """Source of each pixel along one side, (B, side)."""
        index = np.arange(side) + random.integers(-shift, shift + 1, (count, 1))
        index %= (period := max(1, 2 * (side - 1)))
        return np.minimum(index, period - index)  # reflected at both ends

    rows, columns = map(source_indices, sides)
    if mirror:
        columns = np.where(random.random((count, 1)) < 0.5, columns[:, ::-1], columns)
    rows, columns = (_to_device_of(torch.from_numpy(x), images) for x in (rows, columns))
    image, channel = (torch.arange(n, device=images.device) for n in (count, channels))
    return images[
        image[:, None, None, None],
        channel[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def normalise(images: Tensor) -> Tensor:
    """Convert bytes to floats with about zero mean and unit variance on natural images."""
    return (images.float() - 120) / 64


MAX_PIXELS = 2**26  # limit for a picture: a file of kilobytes can decode to gigabytes


def read_png(path: Path | str) -> Tensor:
    """The central square of a PNG of any size, resized to (3, 32, 32) uint8. Transparent pixels
    become white.

    matplotlib reads the file; it does not support 2-bit and 4-bit grey or a single transparent
    colour (tRNS). Raises OSError or SyntaxError if the file is missing, is not a PNG or has more
    than MAX_PIXELS pixels.
    """
    from matplotlib.image import imread
    from PIL.PngImagePlugin import PngImageFile  # what imread uses

    with Path(path).open("rb") as file:
        try:
            width, height = PngImageFile(file).size
            if width * height > MAX_PIXELS:
                raise SyntaxError(
                    f"the picture must be at most {MAX_PIXELS:,} pixels, got"
                    f" {width:,} x {height:,}: shrink it"
                )
            file.seek(0)
            pixels = torch.from_numpy(imread(file, format="png").astype(np.float32))
        except (OSError, SyntaxError, MemoryError):
            raise
        except Exception as error:  # Pillow raises many types for a damaged file
            raise SyntaxError(f"not a readable PNG ({error})") from error
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    side = min(pixels.shape[:2])
    top, left = ((size - side) // 2 for size in pixels.shape[:2])
    pixels = pixels[top : top + side, left : left + side]
    *colour, alpha = pixels.split(1, dim=2)  # each (side, side, 1)
    if len(colour) in (0, 2):  # grey or RGB, without alpha
        colour, alpha = [*colour, alpha], torch.ones_like(alpha)
    opaque = torch.cat(colour, dim=2) * alpha + 1 - alpha
    small = F.interpolate(
        opaque.movedim(2, 0)[None], size=(32, 32), mode="bilinear", antialias=True
    )
    return (255 * small[0].expand(3, -1, -1)).round().to(torch.uint8)
