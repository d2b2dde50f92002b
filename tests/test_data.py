"""Data: downloads are verified and resumed, or a stand-in is announced; batches depend on the seed
and the step alone; a user's own text and pictures are read as they are."""

import contextlib
import hashlib
import http.server
import io
import socketserver
import struct
import tarfile
import threading
from collections import Counter
from dataclasses import replace
from itertools import chain, product

import numpy as np
import pytest
import torch
from PIL import Image

from nala_min import data, runcard
from nala_min.data import CIFAR10, SHAKESPEARE, Source, Vocabulary

CONTENT = "".join(f"Bürger {i}: Höre mich!\n" for i in range(8000)).encode("utf-8")
HALF = 100_000  # about half, in bytes
WRONG_BYTE = CONTENT[:-9] + b"?" + CONTENT[-8:]


def response(body, status="200 OK", length=None):
    """The bytes of an HTTP response whose Content-Length is length."""
    length = len(body) if length is None else length
    return f"HTTP/1.0 {status}\r\nContent-Length: {length}\r\n\r\n".encode() + body


def rest(start, stop=None):
    """The response to a Range request for CONTENT from start, cut off at stop."""
    return response(CONTENT[start:stop], "206 Partial Content", len(CONTENT) - start)


BROKEN_OFF = response(CONTENT[:HALF], length=len(CONTENT))


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.ranges.append(self.headers["Range"])
        with contextlib.suppress(ConnectionError):  # the client may hang up
            self.wfile.write(self.server.answers.pop(0))

    def log_message(self, *arguments):
        pass


def source_of(original, content, url="http://127.0.0.1:9/unused"):
    """original, with another content and address."""
    sha256 = hashlib.sha256(content).hexdigest()
    return replace(original, url=url, size=len(content), sha256=sha256)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A loopback server of Tiny Shakespeare, which is CONTENT. Each GET takes the next of answers
    and adds its Range header to ranges. The cache is empty."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        server.answers, server.ranges = [response(CONTENT)], []
        server.url = f"http://127.0.0.1:{server.server_address[1]}/input.txt"
        server.source = source_of(SHAKESPEARE, CONTENT, server.url)
        monkeypatch.setattr(data, "SHAKESPEARE", server.source)
        server.cache = tmp_path / "cache" / "nala_min"
        server.cache.mkdir(parents=True)
        server.file = server.cache / "tinyshakespeare.txt"
        server.part = server.cache / "tinyshakespeare.txt.part"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def assert_fetched(server, *ranges):
    """The download succeeds with these requests, and leaves only its file."""
    assert data.fetch(server.source).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={start}-" for start in ranges]
    assert [*server.cache.iterdir()] == [server.file]


# --- Downloads ------------------------------------------------------------------------------------


def test_the_sources_are_the_published_files_and_those_of_the_committed_runs():
    """Karpathy's char-rnn, and CIFAR-10 with the checksum in TensorFlow Datasets."""
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data"
    url = f"{url}/tinyshakespeare/input.txt"
    assert SHAKESPEARE == Source("Tiny Shakespeare", url, "tinyshakespeare.txt", 1115394, sha256)
    for path in runcard.RESULTS.glob("shakespeare_cpu_*.json"):
        card = runcard.read_json(path)["data"]
        assert card == {"name": "Tiny Shakespeare", "sha256": sha256, "characters": 1115394}
    sha256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    assert CIFAR10 == Source("CIFAR-10", url, "cifar-10-binary.tar.gz", 170052171, sha256)


def test_a_download_is_announced_shows_its_progress_and_is_cached(server, capsys):
    server.part.write_bytes(CONTENT[:HALF])
    server.answers = [rest(HALF)]
    text = data.load_text()
    assert (text.name, text.text.encode("utf-8")) == ("Tiny Shakespeare", CONTENT)
    out, err = capsys.readouterr()
    assert f"Tiny Shakespeare (206,890 bytes) from {server.url}" in out
    bar = err.split("\r")[-1]  # it counts each byte once
    assert bar.startswith("Tiny Shakespeare: 100%") and " 207k/207k " in bar and "B/s" in bar
    assert data.load_text() == text and capsys.readouterr().out == ""
    assert_fetched(server, HALF)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (response(WRONG_BYTE), "deleted"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + CONTENT, "None bytes"),
        (response(b"not here", "404 Not Found"), "nothing after 0 bytes (HTTP Error 404"),
        (b"220 mail server ready\r\n", "nothing after 0 bytes (220 mail"),
    ],
)
def test_without_a_download_the_stand_in_is_announced(answer, why, server, capsys):
    server.answers = [answer]
    assert data.load_text().name == "Python manual (stand-in)"
    notice = capsys.readouterr().out.partition("NO SHAKESPEARE")[2]
    assert all(x in notice for x in (server.url, why, "Python manual", "not comparable"))
    assert not server.file.exists()
    assert server.ranges == ["bytes=0-"]  # no endless retries


def test_a_broken_download_resumes_at_once_while_more_arrives(server):
    server.answers = [BROKEN_OFF, rest(HALF, HALF + 5), rest(HALF + 5)]
    assert_fetched(server, 0, HALF, HALF + 5)


@pytest.mark.parametrize("no_more", [b"", response(CONTENT[:10], length=len(CONTENT))])
def test_the_next_call_resumes_where_the_download_stopped(no_more, server):
    """The server hangs up, or starts over and breaks off."""
    server.answers = [BROKEN_OFF, no_more, rest(HALF)]
    with pytest.raises(OSError, match=f"{server.url} sent nothing after 100,000 bytes"):
        data.fetch(server.source)
    assert server.part.read_bytes() == CONTENT[:HALF]
    assert_fetched(server, 0, HALF, HALF)


@pytest.mark.parametrize("content", [b"?" * HALF, WRONG_BYTE, CONTENT + b"more"])
def test_wrong_bytes_are_detected_and_deleted(content, server):
    """In the cache, and in a partial download: half of it, all of it and more."""
    server.file.write_bytes(WRONG_BYTE)
    server.part.write_bytes(content)
    server.answers = [rest(HALF)]
    with pytest.raises(ValueError, match="SHA-256"):
        data.fetch(server.source)
    assert not server.part.exists()
    server.answers, server.ranges = [response(CONTENT)], []
    assert_fetched(server, 0)


def test_a_given_file_is_read_byte_for_byte_and_has_no_stand_in(tmp_path, monkeypatch):
    """It is Shakespeare only with its bytes."""
    monkeypatch.setattr(data, "SHAKESPEARE", source_of(SHAKESPEARE, CONTENT))
    path = tmp_path / "märchen.txt"
    for content, name in (
        (CONTENT, "Tiny Shakespeare"),
        (WRONG_BYTE, "märchen.txt"),
        ("Es war\r\neinmal €\n".encode(), "märchen.txt"),
    ):
        path.write_bytes(content)
        text = data.load_text(str(path))
        assert (text.name, text.text.encode("utf-8")) == (name, content)
        assert text.sha256 == hashlib.sha256(content).hexdigest()
    path.write_bytes("Höre mich!".encode("latin-1"))
    with pytest.raises(ValueError, match="utf-8"):
        data.load_text(path)
    with pytest.raises(OSError, match=r"nowhere\.txt"):
        data.load_text(tmp_path / "nowhere.txt")


def test_a_text_is_split_into_its_first_nine_tenths_and_its_last_as_integers():
    vocabulary, training, validation = data.split_text("z" * 96 + "öäüöäüaaaaaaa", block_size=8)
    assert vocabulary == Vocabulary("azäöü")
    assert training.tolist() == [1] * 96 + [3, 2] and training.dtype == torch.int64
    assert vocabulary.decode(validation) == "üöäüaaaaaaa"
    with pytest.raises(ValueError, match="'Xß'"):
        vocabulary.encode("aßXaß")
    assert len(data.split_text("a" * 81, block_size=8)[2]) == 9  # a window and its target
    for length in (0, 80):
        with pytest.raises(ValueError, match="exceed 80"):
            data.split_text("a" * length, block_size=8)


def test_random_windows_start_everywhere_by_seed_and_step_alone():
    inputs, targets = data.random_windows(torch.arange(13), 8, 200, seed=1, step=0)
    assert inputs.shape == (200, 8) and set(inputs[:, 0].tolist()) == {0, 1, 2, 3, 4}
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))
    assert torch.equal(targets, inputs + 1)
    inputs, _ = data.random_windows(torch.arange(10_000), 8, 5, seed=1, step=2)
    assert inputs[:, 0].tolist() == [6427, 4480, 9376, 4305, 878]  # as in the committed runs
    assert not torch.equal(inputs, data.random_windows(torch.arange(10_000), 8, 5, 2, 2)[0])


def test_all_windows_cover_the_tokens_once_except_an_incomplete_one():
    for length, every, starts in (
        (16, 1, [[0]]),
        (17, 1, [[0, 8]]),
        (100, 2, [[0, 16], [32, 48], [64, 80]]),
    ):
        batches = list(data.all_windows(torch.arange(length), 8, 2, every))
        assert [inputs[:, 0].tolist() for inputs, _ in batches] == starts
        for inputs, targets in batches:
            assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))
            assert torch.equal(targets, inputs + 1)


# --- Images ---------------------------------------------------------------------------------------

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"  # in CIFAR-10's order
NAMES = [*(f"data_batch_{i}.bin" for i in (1, 2, 3, 4, 5)), "test_batch.bin"]
RECORDS = np.random.default_rng(0).integers(0, 256, (6, 4, 3073), dtype=np.uint8)
RECORDS[..., 0] = np.arange(24).reshape(6, 4) % 10  # the labels


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the six files, of 4 images each."""
    monkeypatch.setattr(data, "IMAGES_PER_FILE", 4)
    (folder := tmp_path / "parent" / "cifar-10-batches-bin").mkdir(parents=True)
    for name, records in zip(NAMES, RECORDS, strict=True):
        (folder / name).write_bytes(records.tobytes())
    return folder


def assert_is_cifar10(images):
    """Five files for training, in order, and the sixth for testing. A record has a label, then a
    red, a green and a blue plane, row by row."""
    digest = hashlib.sha256()
    for (pictures, labels), files in ((images.train, RECORDS[:5]), (images.test, RECORDS[5:])):
        records = files.reshape(-1, 3073)
        assert pictures.shape == (len(records), 3, 32, 32) and pictures.dtype == torch.uint8
        assert labels.tolist() == records[:, 0].tolist()
        assert pictures.flatten(1).tolist() == records[:, 1:].tolist()
        digest.update(records[:, 1:].tobytes())
        digest.update(b"".join(struct.pack("=q", label) for label in records[:, 0]))
    assert images.sha256 == digest.hexdigest()
    assert images.classes == tuple(CLASSES.split()) and images.mirror


def test_files_are_found_in_a_folder_and_a_missing_or_corrupt_one_is_named(folder, monkeypatch):
    for path in (folder, str(folder.parent)):
        images = data.load_images(path)
        assert_is_cifar10(images)
        assert images.name == "CIFAR-10 (files in a folder)"  # their SHA-256 is unknown
    for corrupt in (RECORDS[5].tobytes()[:-1], bytes(3 * 3073) + b"\n" + bytes(3072)):  # label 10
        (folder / "test_batch.bin").write_bytes(corrupt)
        with pytest.raises(ValueError, match=r"cifar-10-batches-bin.test_batch\.bin is corrupt"):
            data.load_images(folder)
    monkeypatch.undo()  # the original files have 10,000 images each
    with pytest.raises(ValueError, match=r"data_batch_1.bin is corrupt.* 30,730,000 bytes"):
        data.load_images(folder)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(OSError, match=r"data_batch_3\.bin"):
        data.load_images(folder)


def test_the_archive_is_downloaded_once_and_verified(server, folder, capsys, monkeypatch):
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as archive:
        archive.add(folder, "cifar-10-batches-bin")
    content = file.getvalue()
    flipped = content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]
    server.answers = [response(flipped), response(content)]
    monkeypatch.setattr(data, "CIFAR10", source_of(CIFAR10, content, server.url))
    monkeypatch.setattr(data, "drawn_images", lambda: "the stand-in")
    assert data.load_images() == "the stand-in"
    notice = capsys.readouterr().out.partition("NO CIFAR-10")[2]
    assert all(x in notice for x in (server.url, "deleted", "drawn digits", "not comparable"))
    for _ in range(2):
        images = data.load_images()
        assert_is_cifar10(images)
        assert images.name == "CIFAR-10"
    assert len(server.ranges) == 2
    assert [path.name for path in server.cache.iterdir()] == ["cifar-10-binary.tar.gz"]


def test_each_epoch_takes_an_image_at_most_once_in_its_own_order():
    def numbers(count, batch_size, step, seed=1):
        """Which images are in a batch. Image i is filled with i and has label 10 i."""
        images = torch.arange(count)[:, None, None, None].expand(count, 3, 2, 2)
        batch, labels = data.shuffled_batch(images, 10 * images[:, 0, 0, 0], batch_size, seed, step)
        assert batch.shape == (batch_size, 3, 2, 2)
        assert torch.equal(labels, 10 * batch[:, 0, 0, 0])
        return batch[:, 0, 0, 0].tolist()

    steps = [numbers(23, 4, step) for step in range(100)]
    epochs = [tuple(chain(*steps[i : i + 5])) for i in range(0, 100, 5)]
    assert len(set(epochs)) == 20 and all(len(set(epoch)) == 20 for epoch in epochs)
    assert set(chain(*epochs)) == set(range(23))  # none is always left out
    assert sorted(numbers(7, 7, step=3)) == [*range(7)]
    assert numbers(1000, 5, step=300) == [670, 120, 164, 294, 322]  # as in the committed runs
    assert numbers(1000, 5, step=300, seed=2) != [670, 120, 164, 294, 322]


def reflected(i, size):
    """Index of pixel i in a row of size pixels that is reflected at both ends."""
    while not 0 <= i < size:
        i = -i if i < 0 else 2 * (size - 1) - i
    return i


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize(("height", "width", "shift"), [(7, 8, 1), (3, 4, 9)])
def test_shifts_and_mirrored_images_are_equally_frequent(height, width, shift, mirror):
    """A pixel is ten times its row plus its column in channels 0 and 1, and the number of its image
    in channel 2."""

    def shifted(down, right, flipped):
        sources = [width - 1 - x if flipped else x for x in range(width)]
        columns = [reflected(x + right, width) for x in sources]
        return tuple(10 * reflected(y + down, height) + x for y in range(height) for x in columns)

    pixels = 10 * torch.arange(height)[:, None] + torch.arange(width)
    images = torch.stack([pixels.expand(3000, -1, -1)] * 3, dim=1)
    images[:, 2] = torch.arange(3000)[:, None, None]
    augmented = data.augment(images, 1, 2, shift=shift, mirror=mirror)
    assert torch.equal(augmented[:, 1], augmented[:, 0])
    assert torch.equal(augmented[:, 2], images[:, 2])
    drawn = Counter(map(tuple, augmented[:, 0].flatten(1).tolist()))
    shifts = range(-shift, shift + 1)
    expected = Counter(shifted(*x) for x in product(shifts, shifts, {False, mirror}))
    assert drawn.keys() == expected.keys()
    shares = [drawn[x] / 3000 * expected.total() / expected[x] for x in expected]
    assert min(shares) > 0.7 and max(shares) < 1.3  # 4 standard deviations


def test_augmentation_depends_on_seed_and_step_alone_but_not_as_batches_do():
    numbers = torch.arange(6, dtype=torch.uint8).expand(4, 3, 6, 6)
    columns = data.augment(numbers, 1, 2, shift=2, mirror=True)[:, 0, 0].tolist()
    assert columns[0] == [5, 4, 3, 2, 1, 0] and columns[3] == [2, 1, 0, 1, 2, 3]  # as in the runs
    assert columns != data.augment(numbers, 2, 2, shift=2, mirror=True)[:, 0, 0].tolist()
    assert torch.equal(data.augment(numbers, 1, 0, shift=0, mirror=False), numbers)
    assert data.augment(numbers[:, :, :1, :1], 1, 0, shift=3, mirror=True).shape == (4, 3, 1, 1)


def test_only_bytes_are_normalised():
    images = torch.tensor([0, 56, 120, 184, 255], dtype=torch.uint8)
    assert data.normalise(images).tolist() == [-1.875, -1.0, 0.0, 1.0, 135 / 64]
    with pytest.raises(TypeError, match="uint8"):  # floats from 0 to 1 would be almost black
        data.normalise(torch.zeros(1, 3, 4, 4))


def read(folder, picture, kind="PNG", **options):
    """What read_picture returns for a file with a picture of Pillow's."""
    picture.save(folder / "picture", kind, **options)
    return data.read_picture(folder / "picture")


def test_a_picture_of_any_kind_has_its_colour_on_white(tmp_path):
    for mode, pixel, kind, size, colour in (
        ("RGB", (200, 100, 50), "TIFF", 1, [200, 100, 50]),
        ("CMYK", (0, 255, 0, 0), "JPEG", 32, [255, 0, 255]),
        ("L", 77, "GIF", 131, [77, 77, 77]),
        ("RGBA", (200, 100, 50, 51), "PNG", 32, [244, 224, 214]),
        ("LA", (77, 0), "PNG", 32, [255, 255, 255]),
    ):
        picture = read(tmp_path, Image.new(mode, (size, size), pixel), kind)
        assert picture.dtype == torch.uint8 and picture.shape == (3, 32, 32)
        assert picture.flatten(1).unique(dim=1).flatten().tolist() == colour
    for mode in ("I;16", "I", "F"):
        with pytest.raises(ValueError, match="8 bits"):
            read(tmp_path, Image.new(mode, (32, 32), 200), "TIFF")


def test_the_middle_square_is_taken_and_turned_as_the_camera_was_held(tmp_path):
    for height, width, orientation, turns in ((32, 50, 1, 0), (50, 32, 3, 2), (32, 50, 6, 3)):
        image = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
        (exif := Image.Exif())[0x0112] = orientation
        top, left = (height - 32) // 2, (width - 32) // 2
        middle = np.rot90(image[top : top + 32, left : left + 32], turns)  # counterclockwise
        picture = read(tmp_path, Image.fromarray(image), exif=exif)
        assert torch.equal(picture, torch.from_numpy(middle.copy()).movedim(2, 0))
