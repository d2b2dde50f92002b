import hashlib
import http.server
import io
import socketserver
import struct
import tarfile
import threading
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import assert_independent_of_defaults
from torch.testing import assert_close

from nala_min import data
from nala_min.data import BYTES_PER_IMAGE, CIFAR10, CIFAR10_FILES
from nala_min.synthetic import DIGITS_NAME

pytestmark = pytest.mark.usefixtures("tiny")

COUNT = 4  # images per file


def content_of(i):
    """The bytes of the i-th file: random images; the first label is i."""
    records = np.random.default_rng(i).integers(0, 256, (COUNT, BYTES_PER_IMAGE), dtype=np.uint8)
    records[:, 0] = [i, 9, 0, 5]
    return records.tobytes()


FILES = {name: content_of(i) for i, name in enumerate(CIFAR10_FILES)}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Files of COUNT images, and a separate cache for each test."""
    monkeypatch.setattr(data, "IMAGES_PER_FILE", COUNT)
    monkeypatch.setattr(data, "CIFAR10", UNUSED)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def few():
    return data.drawn_images(7, 3)


@pytest.fixture
def stand_in(few, monkeypatch):
    """The result of drawn_images, small for speed."""
    monkeypatch.setattr(data, "drawn_images", lambda: few)
    return few


@pytest.fixture
def folder(tmp_path):
    """A folder with the six files."""
    folder = tmp_path / "parent" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def archive():
    """The bytes of a .tar.gz of the six files, and of a text."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in {"readme.html": b"hello", **FILES}.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


ARCHIVE = archive()
UNUSED = replace(
    CIFAR10,
    url="http://127.0.0.1:0/unused",
    size=len(ARCHIVE),
    sha256=hashlib.sha256(ARCHIVE).hexdigest(),
)  # a source of ARCHIVE that cannot be fetched


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror(tmp_path):
    """The address of a loopback server with archive.tar.gz, which is ARCHIVE, and wrong.tar.gz."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "archive.tar.gz").write_bytes(ARCHIVE)
    (served / "wrong.tar.gz").write_bytes(ARCHIVE[:-1] + b"?")
    handler = partial(Handler, directory=str(served))
    with socketserver.TCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def paths_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_is_cifar10(images):
    """Decoded by hand: five files for training, in order, and the sixth for testing."""
    parts = [images.train, images.test]
    for (pictures, labels), names in zip(
        parts, [CIFAR10_FILES[:5], CIFAR10_FILES[5:]], strict=True
    ):
        content = b"".join(FILES[name] for name in names)
        records = [
            content[i : i + BYTES_PER_IMAGE] for i in range(0, len(content), BYTES_PER_IMAGE)
        ]
        assert pictures.shape == (len(records), 3, 32, 32) and pictures.dtype == torch.uint8
        assert labels.shape == (len(records),) and labels.dtype == torch.int64
        assert labels.tolist() == [record[0] for record in records]
        assert pictures.flatten(1).tolist() == [list(record[1:]) for record in records]
    assert images.classes[0] == "airplane" and images.classes[9] == "truck"
    assert len(images.classes) == 10
    assert images.mirror


# --- CIFAR-10 from a folder ----------------------------------------------------------------------


def test_a_record_is_a_label_and_a_red_a_green_and_a_blue_plane_row_by_row(folder):
    record = bytearray(BYTES_PER_IMAGE)
    record[0] = 7
    for plane, row, column, value in [(0, 0, 1, 11), (0, 1, 0, 12), (1, 2, 3, 13), (2, 31, 31, 14)]:
        record[1 + 1024 * plane + 32 * row + column] = value
    (folder / "data_batch_3.bin").write_bytes(
        bytes(COUNT * BYTES_PER_IMAGE - BYTES_PER_IMAGE) + record
    )
    pictures, labels = data.load_images(folder=folder).train
    index = 3 * COUNT - 1  # the last image of the third file
    assert labels[index] == 7
    expected = torch.zeros(3, 32, 32, dtype=torch.uint8)
    expected[0, 0, 1], expected[0, 1, 0], expected[1, 2, 3], expected[2, 31, 31] = 11, 12, 13, 14
    assert torch.equal(pictures[index], expected)


def test_the_files_are_found_in_the_folder_and_in_the_one_above_it(folder, tmp_path):
    (link := tmp_path / "link").symlink_to(folder)
    for path in (folder, folder.parent, str(folder), link):
        images = data.load_images(folder=path)
        assert_is_cifar10(images)
        assert images.name == "CIFAR-10 (files in a folder)"  # their SHA-256 is unknown


@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
def test_a_file_missing_from_a_folder_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(OSError, match=name):
        data.load_images(folder=folder)


@pytest.mark.parametrize("name", ["nowhere", "a file", "cifar-10-batches-py"])
def test_a_folder_without_the_files_is_named(name, tmp_path):
    (tmp_path / "a file").touch()
    (tmp_path / "cifar-10-batches-py").mkdir()  # Python's version of CIFAR-10
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").touch()
    with pytest.raises(OSError, match=f"{name}.*data_batch_1.bin"):
        data.load_images(folder=tmp_path / name)


LABELS_TO_TEN = (
    bytes(COUNT * BYTES_PER_IMAGE - BYTES_PER_IMAGE) + b"\n" + bytes(BYTES_PER_IMAGE - 1)
)  # the last label is 10
CORRUPT = {
    "truncated": content_of(0)[:-1],
    "a record short": content_of(0)[:-BYTES_PER_IMAGE],
    "overlong": content_of(0) + b"\0",
    "empty": b"",
    "label above 9": LABELS_TO_TEN,
}


@pytest.mark.parametrize("corrupt", CORRUPT)
def test_a_corrupt_file_in_a_folder_is_named(corrupt, folder):
    name = "test_batch.bin"
    (folder / name).write_bytes(CORRUPT[corrupt])
    with pytest.raises(ValueError, match="corrupt") as error:
        data.load_images(folder=folder)
    assert str(folder / name) in str(error.value)


# --- CIFAR-10 from the network -------------------------------------------------------------------


def test_the_archive_is_downloaded_once_and_cached(mirror, tmp_path, capsys, monkeypatch):
    address = f"{mirror}/archive.tar.gz"
    monkeypatch.setattr(data, "CIFAR10", replace(UNUSED, url=address))
    images = data.load_images()
    assert_is_cifar10(images)
    assert images.name == "CIFAR-10"
    assert paths_below(tmp_path / "cache" / "nala_min") == [CIFAR10.file]  # it is not unpacked
    message = capsys.readouterr().out
    assert address in message and f"{len(ARCHIVE):,} bytes" in message

    (tmp_path / "served" / "archive.tar.gz").unlink()
    assert_is_cifar10(data.load_images())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("path", ["nothing.tar.gz", "wrong.tar.gz"])
def test_without_the_archive_the_stand_in_is_announced(
    path, mirror, tmp_path, stand_in, capsys, monkeypatch
):
    url, why = f"{mirror}/{path}", "404" if path == "nothing.tar.gz" else "deleted"
    monkeypatch.setattr(data, "CIFAR10", replace(UNUSED, url=url))
    assert data.load_images() is stand_in
    message = capsys.readouterr().out.partition("NO CIFAR-10")[2]
    assert DIGITS_NAME in message and url in message and why in message
    assert paths_below(tmp_path / "cache" / "nala_min") == []


# --- Hashes of images ----------------------------------------------------------------------------


def test_the_sha256_is_of_training_images_and_labels_then_of_test_images_and_labels(folder):
    images = data.load_images(folder=folder)
    digest = hashlib.sha256()
    for names in (CIFAR10_FILES[:5], CIFAR10_FILES[5:]):
        records = np.frombuffer(b"".join(FILES[name] for name in names), np.uint8)
        records = records.reshape(-1, BYTES_PER_IMAGE)
        digest.update(records[:, 1:].tobytes())
        digest.update(b"".join(struct.pack("=q", label) for label in records[:, 0]))
    assert images.sha256 == digest.hexdigest()


# --- Batches -------------------------------------------------------------------------------------


def numbered(count):
    """Images filled with their number, and labels of ten times that."""
    numbers = torch.arange(count)
    return numbers[:, None, None, None].expand(count, 3, 2, 2), 10 * numbers


def numbers_of(count, batch_size, seed, step):
    pictures, labels = data.shuffled_batch(*numbered(count), batch_size, seed, step)
    assert pictures.shape == (batch_size, 3, 2, 2)
    assert torch.equal(labels, 10 * pictures[:, 0, 0, 0])
    return pictures[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(("count", "batch_size"), [(23, 4), (7, 7)])
def test_each_epoch_takes_an_image_at_most_once_and_in_another_order(count, batch_size):
    steps = count // batch_size
    epochs = [
        [i for step in range(steps) for i in numbers_of(count, batch_size, 1, epoch * steps + step)]
        for epoch in range(20)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == steps * batch_size
    assert len({tuple(epoch) for epoch in epochs}) > 15
    assert {i for epoch in epochs for i in epoch} == set(range(count))  # none is always left out


def test_a_batch_is_a_function_of_seed_and_step_alone():
    def batch(seed, step):
        return numbers_of(1000, 10, seed, step)

    assert numbers_of(1000, 5, 1, 300) == [670, 120, 164, 294, 322]  # as in the committed runs
    others = [batch(seed, step) for seed in range(5) for step in (0, 1, 99, 100, 200)]
    assert all(others.count(other) == 1 for other in others)
    np.random.default_rng(0)
    torch.manual_seed(5)
    again = [batch(seed, step) for seed in range(5) for step in (0, 1, 99, 100, 200)]
    assert again == others


# --- Augmentation --------------------------------------------------------------------------------


def reflected(i, size):
    """Index of pixel i in a row of size pixels that is reflected at both ends."""
    while not 0 <= i < size:
        i = -i if i < 0 else 2 * (size - 1) - i
    return i


def shifted(image, down, right, mirrored):
    """image, shifted and mirrored pixel by pixel."""
    channels, height, width = image.shape
    result = torch.empty_like(image)
    for channel in range(channels):
        for y in range(height):
            for x in range(width):
                source = width - 1 - x if mirrored else x
                row, column = reflected(y - down, height), reflected(source - right, width)
                result[channel, y, x] = image[channel, row, column]
    return result


@pytest.mark.parametrize(("height", "width", "shift"), [(6, 5, 2), (3, 4, 9)])
@pytest.mark.parametrize("mirror", [True, False])
def test_each_image_is_shifted_and_maybe_mirrored(height, width, shift, mirror):
    torch.manual_seed(height)
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    augmented = data.augment(image.expand(60, -1, -1, -1), 1, 2, shift=shift, mirror=mirror)
    assert augmented.dtype == torch.uint8
    shifts = range(-shift, shift + 1)
    allowed = {
        shifted(image, down, right, mirrored).numpy().tobytes()
        for down in shifts
        for right in shifts
        for mirrored in {False, mirror}
    }
    assert {picture.tobytes() for picture in augmented.numpy()} <= allowed


@pytest.mark.parametrize("mirror", [True, False])
def test_all_shifts_occur_equally_often_in_each_direction_and_half_are_mirrored(mirror):
    image, count = torch.randint(256, (3, 7, 8), dtype=torch.uint8), 3000
    augmented = data.augment(image.expand(count, -1, -1, -1), 1, 2, shift=1, mirror=mirror)
    names = {
        shifted(image, down, right, mirrored).numpy().tobytes(): (down, right, mirrored)
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
        for mirrored in (False, True)
    }
    drawn = [names[picture.tobytes()] for picture in augmented.numpy()]
    kinds = 18 if mirror else 9
    assert len(set(drawn)) == kinds
    assert all(mirror or not mirrored for _, _, mirrored in drawn)
    shares = [drawn.count(kind) / count * kinds for kind in set(drawn)]
    assert min(shares) > 0.7 and max(shares) < 1.3  # 4 standard deviations at 18 kinds


def test_augmentation_is_a_function_of_images_seed_and_step_alone():
    images = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8)
    before = images.clone()

    def augmented(seed, step):
        return data.augment(images, seed, step, shift=3, mirror=True).numpy().tobytes()

    numbers = torch.arange(6, dtype=torch.uint8).expand(4, 3, 6, 6)
    columns = data.augment(numbers, 1, 2, shift=2, mirror=True)[:, 0, 0].tolist()
    assert columns == [  # as in the committed runs
        [5, 4, 3, 2, 1, 0],
        [4, 5, 4, 3, 2, 1],
        [1, 2, 3, 4, 5, 4],
        [2, 1, 0, 1, 2, 3],
    ]
    others = [augmented(seed, step) for seed in range(4) for step in range(4)]
    torch.manual_seed(77)
    assert [augmented(seed, step) for seed in range(4) for step in range(4)] == others
    assert len(set(others)) == 16
    assert torch.equal(images, before)  # not changed in place


def test_no_image_takes_pixels_of_another_or_of_another_channel():
    numbers = torch.arange(20 * 3, dtype=torch.uint8).view(20, 3, 1, 1).expand(20, 3, 8, 6)
    assert torch.equal(data.augment(numbers, 1, 0, shift=4, mirror=True), numbers)


def test_without_shift_and_mirror_nothing_is_changed():
    images = torch.randint(256, (5, 3, 8, 6), dtype=torch.uint8)
    assert torch.equal(data.augment(images, 1, 0, shift=0, mirror=False), images)


def test_normalised_bytes_lie_around_zero_with_the_order_kept():
    images = torch.tensor([0, 56, 120, 184, 255], dtype=torch.uint8)
    assert_close(data.normalise(images), torch.tensor([-1.875, -1.0, 0.0, 1.0, 135 / 64]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_only_bytes_are_normalised(dtype):
    """Floats from 0 to 1 would be read as an almost black image."""
    with pytest.raises(TypeError, match=f"images must be uint8, .* got {dtype}"):
        data.normalise(torch.zeros(1, 3, 4, 4, dtype=dtype))


# --- A user's own pictures ------------------------------------------------------------------------


def png(pixels, kind, depth=8, more=b""):
    """The bytes of a PNG: rows of pixels, each a tuple of depth-bit samples; more: extra chunks."""

    def chunk(name, body):
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    rows = b""
    for row in pixels:
        bits = "".join(f"{sample:0{depth}b}" for pixel in row for sample in pixel)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    head = struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), depth, kind, 0, 0, 0)
    more = b"".join(chunk(name, body) for name, body in more) if more else b""
    body = chunk(b"IHDR", head) + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # the format's colour types


@pytest.fixture
def read(tmp_path):
    """read(content): the image that read_picture returns for a link to a file with this content."""

    def read(content):
        (tmp_path / "picture").write_bytes(content)
        if not (tmp_path / "link").exists():
            (tmp_path / "link").symlink_to("picture")
        image = data.read_picture(tmp_path / "link")
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        return image

    return read


def plane(pixel, size=32):
    """size rows of size equal pixels."""
    return [[pixel] * size] * size


def saved(mode, colour, kind, size=32, **options):
    """The bytes of a picture of one colour in this format."""
    Image.new(mode, (size, size), colour).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


COLOURS = (b"PLTE", bytes([1, 2, 3, 200, 100, 50]))
# kind of picture: (its content, the colour of all its pixels)
ONE_COLOUR = {
    "JPEG": (saved("RGB", (200, 100, 50), "JPEG", quality=95), (200, 100, 50)),
    "grey JPEG": (saved("L", 77, "JPEG"), (77, 77, 77)),
    "JPEG for print": (saved("CMYK", (0, 255, 0, 0), "JPEG"), (255, 0, 255)),
    "WebP": (saved("RGBA", (200, 100, 50, 0), "WEBP", lossless=True), (255, 255, 255)),
    "GIF": (saved("L", 77, "GIF"), (77, 77, 77)),
    "TIFF": (saved("RGB", (200, 100, 50), "TIFF"), (200, 100, 50)),
    "BMP": (saved("RGB", (200, 100, 50), "BMP"), (200, 100, 50)),
    "red, green, blue": (png(plane((200, 100, 50)), RGB), (200, 100, 50)),
    "transparent": (png(plane((200, 100, 50, 0)), RGBA), (255, 255, 255)),
    "half transparent": (png(plane((200, 100, 50, 51)), RGBA), (244, 224, 214)),
    "grey and transparent": (png(plane((77, 0)), GREY_ALPHA), (255, 255, 255)),
    "one transparent grey": (png(plane((77,)), GREY, 8, [(b"tRNS", b"\0\x4d")]), (255, 255, 255)),
    "16 bits": (png(plane((200 * 257, 100 * 257, 50 * 257)), RGB, 16), (200, 100, 50)),
    "4 bits of grey": (png(plane((5,)), GREY, 4), (85, 85, 85)),
    "black or white": (png(plane((1,)), GREY, 1), (255, 255, 255)),
    "palette": (png(plane((1,)), PALETTE, 8, [COLOURS]), (200, 100, 50)),
    "small palette": (png(plane((1,)), PALETTE, 1, [COLOURS]), (200, 100, 50)),
    "transparent in a palette": (
        png(plane((1,)), PALETTE, 8, [COLOURS, (b"tRNS", b"\xff\x00")]),
        (255, 255, 255),
    ),
    "one pixel": (png(plane((200, 100, 50), 1), RGB), (200, 100, 50)),
    "large": (png(plane((200, 100, 50), 131), RGB), (200, 100, 50)),
}


@pytest.mark.parametrize("kind", ONE_COLOUR)
def test_a_picture_of_any_kind_has_its_colour(kind, read):
    content, colour = ONE_COLOUR[kind]
    expected = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
    assert torch.equal(read(content), expected)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_a_picture_is_turned_as_the_camera_was_held(orientation, turns, read):
    image = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    (exif := Image.Exif())[0x0112] = orientation
    Image.fromarray(image).save(file := io.BytesIO(), "PNG", exif=exif)
    expected = np.rot90(image, turns)  # counterclockwise
    assert torch.equal(read(file.getvalue()), torch.from_numpy(expected.copy()).movedim(2, 0))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 50), (50, 32)])
def test_the_middle_square_of_a_picture_is_taken_pixel_for_pixel(height, width, read):
    image = torch.randint(256, (height, width, 3))
    content = png([[tuple(pixel) for pixel in row] for row in image.tolist()], RGB)
    top, left = (height - 32) // 2, (width - 32) // 2
    middle = image[top : top + 32, left : left + 32].movedim(2, 0)
    assert torch.equal(read(content), middle.to(torch.uint8))


def test_a_larger_picture_is_averaged_not_subsampled(read):
    """Subsampling would alias a fine pattern."""
    stripes = [[(255 * (x % 4 in (1, 2)),) for x in range(128)]] * 128
    image = read(png(stripes, GREY)).float()
    assert (image - 127.5).abs().max() < 12  # slightly more than half is white at the sides


def test_a_smaller_picture_keeps_its_sides(read):
    image = read(png([[(0,), (0,), (255,), (255,)]] * 4, GREY))
    assert image[:, :, :12].max() == 0 and image[:, :, 20:].min() == 255


PICTURE = ONE_COLOUR["red, green, blue"][0]


def resized(content, width, height):
    """content with another size in its header."""
    head = struct.pack(">II", width, height) + content[24:29]
    check = struct.pack(">I", zlib.crc32(b"IHDR" + head))
    return content[:16] + head + check + content[33:]


NO_PICTURE = {
    "empty": b"",
    "text": b"not a picture\n" * 9,
    "head only": PICTURE[:40],
    "truncated": PICTURE[:-30],
    "truncated JPEG": ONE_COLOUR["JPEG"][0][:-30],
    "corrupt": PICTURE[:45] + b"?" * 9 + PICTURE[54:],
    "no pixels": resized(PICTURE, 0, 0),
    "too many pixels": resized(PICTURE, 2**14, 2**14),  # a small file must not need gigabytes
    "16 bits of grey": png(plane((77 * 257,)), GREY, 16),
    "numbers without a scale": saved("F", 0.3, "TIFF"),
    "32 bits of grey": saved("I", 7_000_000, "TIFF"),
}


@pytest.mark.parametrize("kind", NO_PICTURE)
def test_a_file_that_is_not_a_picture_raises(kind, read):
    with pytest.raises(Exception) as error:  # Pillow raises many types
        read(NO_PICTURE[kind])
    assert not isinstance(error.value, AssertionError | MemoryError) and str(error.value)


@pytest.mark.parametrize("name", ["", "nowhere.png", "dangling"])
def test_a_missing_picture_or_a_folder_raises_os_error(name, tmp_path):
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(OSError, match=name or tmp_path.name):
        data.read_picture(tmp_path / name)


def test_images_do_not_depend_on_torch_s_defaults(folder, tmp_path):
    (tmp_path / "picture.png").write_bytes(PICTURE)

    def make():
        images = data.load_images(folder=folder)
        batch, _ = data.shuffled_batch(*images.train, 2, seed=1, step=0)
        shifted = data.augment(batch, 1, 0, shift=2, mirror=True)
        return [data.read_picture(str(tmp_path / "picture.png")), shifted, data.normalise(shifted)]

    assert_independent_of_defaults(make)
