import hashlib
import http.client
import http.server
import socket
import socketserver
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from nala_min import data
from nala_min.data import SHAKESPEARE, STAND_IN, Vocabulary, all_windows, random_windows

CONTENT = "".join(f"Bürger {i}: Höre mich!\n" for i in range(8000)).encode("utf-8")  # 2 reads
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def answer(body, status="200 OK", length=None):
    """The bytes of an HTTP answer that claims a body of length bytes."""
    length = len(body) if length is None else length
    return f"HTTP/1.0 {status}\r\nContent-Length: {length}\r\n\r\n".encode() + body


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4000\r\n" + CONTENT[:100]
TRUNCATED = (ValueError, http.client.HTTPException)  # Python's version decides

# What a server does -> its answer (None: it refuses the connection) and what download raises.
FAILURES = {
    "wrong bytes": (answer(CONTENT.replace(b"7", b"8")), ValueError),
    "empty body": (answer(b""), ValueError),
    "truncated": (answer(CONTENT[:100_000], length=len(CONTENT)), TRUNCATED),
    "truncated chunk": (CHUNKED, http.client.HTTPException),
    "not HTTP": (b"220 mail server ready\r\n", http.client.HTTPException),
    "no answer": (b"", OSError),
    "404": (answer(b"not here", status="404 Not Found"), OSError),
    "refused": (None, OSError),
}
failures = pytest.mark.parametrize("failure", FAILURES)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        self.server.may_answer.wait(5)
        self.wfile.write(self.server.answer)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A loopback server that answers each GET with server.answer and counts server.requests."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        server.answer, server.requests = answer(CONTENT), 0
        server.may_answer = threading.Event()
        server.may_answer.set()
        server.url = f"http://127.0.0.1:{server.server_address[1]}/input.txt"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.may_answer.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def url_of(server):
    """url_of(failure): the address of a server that fails so."""

    def url_of(failure):
        server.answer = FAILURES[failure][0]
        if server.answer is not None:
            return server.url
        with socket.create_server(("127.0.0.1", 0)) as closed:
            return f"http://127.0.0.1:{closed.getsockname()[1]}/input.txt"

    return url_of


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Where the download belongs, in a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nala_min" / "tinyshakespeare.txt"


def files_below(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# --- A text of one's own -------------------------------------------------------------------------


def test_a_given_file_is_read_byte_for_byte(tmp_path):
    path, messages = tmp_path / "märchen.txt", []
    path.write_bytes("Es war\r\neinmal €\n".encode())
    text = data.load_text(path, announce=messages.append)
    assert text.name == "märchen.txt"
    assert text.text == "Es war\r\neinmal €\n"
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert messages == []


def test_a_given_file_with_the_bytes_of_shakespeare_is_named_so(tmp_path):
    path = tmp_path / "renamed.txt"
    path.write_bytes(CONTENT)
    assert data.load_text(path, sha256=SHA256).name == SHAKESPEARE
    path.write_bytes(CONTENT + b"\n")
    assert data.load_text(path, sha256=SHA256).name == "renamed.txt"


def test_a_given_file_that_is_not_utf8_raises_value_error(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("Höre mich!".encode("latin-1"))
    with pytest.raises(ValueError, match="utf-8"):
        data.load_text(path)


def test_a_given_file_that_is_missing_raises_os_error(tmp_path):
    with pytest.raises(OSError, match=r"nowhere\.txt"):
        data.load_text(tmp_path / "nowhere.txt")


# --- The download and its cache ------------------------------------------------------------------


def test_a_download_is_cached_and_not_fetched_twice(server, cached):
    messages = []
    load = partial(data.load_text, url=server.url, sha256=SHA256, announce=messages.append)
    assert load() == load() == data.Text(SHAKESPEARE, CONTENT.decode("utf-8"))
    assert load().sha256 == SHA256
    assert server.requests == 1
    assert len(messages) == 1 and server.url in messages[0]
    assert files_below(cached.parent) == [cached.name]
    assert cached.read_bytes() == CONTENT


def test_a_corrupt_cached_file_is_fetched_again(server, cached):
    cached.parent.mkdir(parents=True)
    cached.write_bytes(CONTENT[:-1])
    text = data.load_text(url=server.url, sha256=SHA256)
    assert text == data.Text(SHAKESPEARE, CONTENT.decode("utf-8"))
    assert server.requests == 1
    assert cached.read_bytes() == CONTENT


def test_a_corrupt_cached_file_is_not_used_without_a_network(url_of, cached):
    cached.parent.mkdir(parents=True)
    cached.write_bytes(CONTENT[:-1])
    assert data.load_text(url=url_of("refused"), sha256=SHA256).name == STAND_IN


@failures
def test_without_a_download_the_stand_in_is_announced_and_nothing_is_cached(
    failure, url_of, cached
):
    messages = []
    text = data.load_text(url=url_of(failure), sha256=SHA256, announce=messages.append)
    assert text.name == STAND_IN
    assert len(text.text) > 400_000
    assert "NO SHAKESPEARE" in messages[-1] and STAND_IN in messages[-1]
    assert files_below(cached.parents[1]) == []


def test_a_cache_that_cannot_be_written_gives_the_stand_in(server, cached):
    cached.parents[1].write_text("a file where the folder should be", encoding="utf-8")
    assert data.load_text(url=server.url, sha256=SHA256).name == STAND_IN


@failures
def test_a_broken_download_raises_and_leaves_no_file(failure, url_of, tmp_path):
    with pytest.raises(FAILURES[failure][1]):
        data.download(url_of(failure), tmp_path / "new" / "input.txt", SHA256)
    assert files_below(tmp_path) == []


def test_a_broken_download_leaves_the_old_file(url_of, tmp_path):
    path = tmp_path / "input.txt"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=SHA256):
        data.download(url_of("wrong bytes"), path, SHA256)
    assert files_below(tmp_path) == ["input.txt"]
    assert path.read_bytes() == b"old"


def test_a_silent_server_raises_os_error_after_the_timeout(server, tmp_path):
    server.may_answer.clear()
    with pytest.raises(OSError, match="timed out"):
        data.download(server.url, tmp_path / "input.txt", SHA256, timeout=0.1)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("value", [None, ""])
def test_the_cache_is_below_home_unless_xdg_says_otherwise(value, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_dir() == tmp_path / ".cache" / "nala_min"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert data.cache_dir() == tmp_path / "other" / "nala_min"


# --- Characters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["hello, world\n", "Zoë zahlt 5 €\r\n", "a\u0308ä 🎭𝄞", ""])
def test_a_vocabulary_decodes_what_it_encodes(text):
    vocabulary = Vocabulary.of(text)
    tokens = vocabulary.encode(text)
    assert tokens.dtype == torch.long and tokens.shape == (len(text),)
    assert vocabulary.decode(tokens) == text
    assert sorted(set(tokens.tolist())) == list(range(len(vocabulary.characters)))


def test_a_vocabulary_is_sorted_and_does_not_depend_on_the_order_of_the_text():
    assert Vocabulary.of("banänas") == Vocabulary.of("säbnan") == Vocabulary("abnsä")


def test_encode_names_the_unknown_characters_and_no_others():
    with pytest.raises(ValueError, match="'Z€'"):
        Vocabulary.of("abc").encode("a€bZc€")


@pytest.mark.parametrize("length", [81, 100, 109, 1234])
def test_a_text_is_split_into_its_first_nine_tenths_and_its_last_tenth(length):
    text = "".join(chr(ord("ä") + i % 50) for i in range(length))
    vocabulary, training, validation = data.split_text(text, block_size=8)
    assert vocabulary == Vocabulary.of(text)
    assert vocabulary.decode(training) + vocabulary.decode(validation) == text
    assert len(training) == length * 9 // 10


@pytest.mark.parametrize("length", [0, 1, 8, 79, 80])
def test_a_text_of_less_than_a_window_and_its_target_in_the_last_tenth_is_not_split(length):
    with pytest.raises(ValueError, match="more than 80"):
        data.split_text("a" * length, block_size=8)


# --- Windows -------------------------------------------------------------------------------------


def test_random_windows_are_pieces_of_the_text_and_targets_come_one_later():
    inputs, targets = random_windows(torch.arange(100), 8, 5, seed=1, step=0)
    assert inputs.shape == targets.shape == (5, 8)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))
    assert torch.equal(targets, inputs + 1)


def test_random_windows_are_a_function_of_seed_and_step_alone():
    def batch(seed, step):
        return random_windows(torch.arange(10_000), 8, 5, seed, step)[0].tolist()

    assert batch(3, 4) == batch(3, 4)
    others = [batch(seed, step) for seed in range(5) for step in range(5)]
    assert all(others.count(other) == 1 for other in others)


@pytest.mark.parametrize("num_windows", [1, 2, 5])
def test_random_windows_reach_every_place_and_never_run_beyond_the_end(num_windows):
    block = 8
    inputs, targets = random_windows(torch.arange(block + num_windows), block, 200, seed=1, step=0)
    assert set(inputs[:, 0].tolist()) == set(range(num_windows))
    assert targets.max() == block + num_windows - 1


@pytest.mark.parametrize(("length", "left_over"), [(9, 0), (16, 7), (17, 0), (100, 3)])
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_all_windows_predict_each_token_once_but_a_rest_shorter_than_a_window(
    length, left_over, batch
):
    batches = list(all_windows(torch.arange(length), 8, batch))
    assert all(len(inputs) <= batch for inputs, _ in batches)
    assert all(inputs.shape == targets.shape for inputs, targets in batches)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert inputs.shape[1] == 8
    assert targets.flatten().tolist() == list(range(1, length - left_over))
    assert torch.equal(inputs, targets - 1)


@pytest.mark.parametrize("every", [2, 3, 50])
def test_every_n_takes_each_nth_of_all_windows(every):
    def windows(every):
        batches = list(all_windows(torch.arange(100), 8, 2, every))
        inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return torch.stack([inputs, targets], dim=1)

    assert torch.equal(windows(every), windows(1)[::every])
