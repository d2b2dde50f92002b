import contextlib
import gc
import hashlib
import http.client
import http.server
import os
import socket
import socketserver
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from scripts import assert_independent_of_defaults
from tqdm import tqdm

from nala_min import data
from nala_min.data import SHAKESPEARE, Vocabulary, all_windows, random_windows
from nala_min.synthetic import MANUAL_NAME

CONTENT = "".join(f"Bürger {i}: Höre mich!\n" for i in range(8000)).encode("utf-8")  # 4 reads
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALF = 100_000  # about half, in bytes
BLOCK = 1 << 16  # bytes per read


def response(body, status="200 OK", length=None):
    """The bytes of an HTTP response whose Content-Length is length."""
    length = len(body) if length is None else length
    return f"HTTP/1.0 {status}\r\nContent-Length: {length}\r\n\r\n".encode() + body


def rest(start, stop=None):
    """The response to a Range request for CONTENT from start, cut off at stop."""
    return response(CONTENT[start:stop], "206 Partial Content", len(CONTENT) - start)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4000\r\n" + CONTENT[:100]
WRONG_BYTE = CONTENT[:-9] + b"?" + CONTENT[-8:]
BROKEN_OFF = response(CONTENT[:HALF], length=len(CONTENT))

# failure: (the response; None refuses the connection, the exception from download)
FAILURES = {
    "wrong byte": (response(WRONG_BYTE), ValueError),
    "a byte too many": (response(CONTENT + b"\n"), ValueError),
    "empty body": (response(b""), (OSError, ValueError)),
    "an error page": (response(b"<p>Sign in first</p>"), (OSError, ValueError)),
    "truncated chunk": (CHUNKED, http.client.HTTPException),
    "not HTTP": (b"220 mail server ready\r\n", http.client.HTTPException),
    "no answer": (b"", OSError),
    "404": (response(b"not here", status="404 Not Found"), OSError),
    "refused": (None, OSError),
}
failures = pytest.mark.parametrize("failure", FAILURES)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.ranges.append(self.headers["Range"])
        server.may_respond.wait(5)
        response = server.responses.pop(0) if len(server.responses) > 1 else server.responses[0]
        with contextlib.suppress(ConnectionError):  # the client may hang up early
            for piece in [response] if isinstance(response, bytes) else response():
                self.wfile.write(piece)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A loopback server. Each GET gets the next of server.responses, then the last one repeatedly.
    A response is bytes or a generator function. server.ranges has the Range header of each GET."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        server.responses, server.ranges = [response(CONTENT)], []
        server.may_respond = threading.Event()
        server.may_respond.set()
        server.source = source_at(f"http://127.0.0.1:{server.server_address[1]}/input.txt")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.may_respond.set()
        server.shutdown()
        thread.join()


def source_at(url):
    """A source for CONTENT at url, under the name of Tiny Shakespeare."""
    return replace(SHAKESPEARE, url=url, size=len(CONTENT), sha256=SHA256)


@pytest.fixture
def source_of(server):
    """source_of(failure): a source on a server with this failure."""

    def source_of(failure):
        server.responses = [FAILURES[failure][0]]
        if server.responses != [None]:
            return server.source
        with socket.create_server(("127.0.0.1", 0)) as closed:
            return source_at(f"http://127.0.0.1:{closed.getsockname()[1]}/input.txt")

    return source_of


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The path of the download, in a separate cache for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nala_min" / "tinyshakespeare.txt"


def files_below(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# --- A user's own text ---------------------------------------------------------------------------


def test_a_given_file_is_read_byte_for_byte(tmp_path, capsys):
    path = tmp_path / "märchen.txt"
    path.write_bytes("Es war\r\neinmal €\n".encode())
    text = data.load_text(path)
    assert text.name == "märchen.txt"
    assert text.text == "Es war\r\neinmal €\n"
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "is_shakespeare"),
    [(CONTENT, True), (CONTENT + b"\n", False), (WRONG_BYTE, False)],
    ids=["same", "longer", "as long"],
)
def test_a_given_file_is_shakespeare_only_with_its_bytes(content, is_shakespeare, tmp_path):
    path = tmp_path / "renamed.txt"
    path.write_bytes(content)
    text = data.load_text(path, source=source_at("http://unused"))
    assert text.name == (SHAKESPEARE.name if is_shakespeare else "renamed.txt")
    assert text.text.encode("utf-8") == content


def test_a_given_file_may_be_a_string(tmp_path):
    (path := tmp_path / "text.txt").write_bytes(CONTENT)
    source = source_at("http://unused")
    assert data.load_text(str(path)) == data.load_text(path)
    assert source.matches(str(path)) and source.hash(str(path)) == source.hash(path)


def test_a_given_file_that_is_not_utf8_raises_value_error(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("Höre mich!".encode("latin-1"))
    with pytest.raises(ValueError, match="utf-8"):
        data.load_text(path)


def test_a_given_file_that_is_missing_raises_os_error(tmp_path):
    with pytest.raises(OSError, match=r"nowhere\.txt"):
        data.load_text(tmp_path / "nowhere.txt")


# --- A source and its cache ----------------------------------------------------------------------


def test_a_source_matches_only_a_file_with_its_bytes(tmp_path):
    source, path = source_at("http://unused"), tmp_path / "file"
    assert not source.matches(path)
    assert not source.matches(tmp_path)  # a folder
    path.write_bytes(CONTENT)
    assert source.matches(path)
    assert not replace(source, size=source.size + 1).matches(path)
    path.write_bytes(WRONG_BYTE)
    assert not source.matches(path)


def test_a_download_is_cached_and_not_fetched_twice(server, cached, capsys):
    load = partial(data.load_text, source=server.source)
    assert load() == load() == data.Text(SHAKESPEARE.name, CONTENT.decode("utf-8"))
    assert load().sha256 == SHA256
    assert len(server.ranges) == 1
    assert capsys.readouterr().out.count(server.source.url) == 1
    assert files_below(cached.parent) == [cached.name]
    assert cached.read_bytes() == CONTENT


def test_fetch_announces_the_size_and_the_hint_before_it_downloads(server, cached, monkeypatch):
    messages = []

    def announce(message):
        messages.append((message, len(server.ranges)))

    monkeypatch.setattr("builtins.print", announce)
    assert data.fetch(server.source, hint=": slow") == cached
    [(message, requests)] = messages
    assert requests == 0
    assert SHAKESPEARE.name in message and f"{len(CONTENT):,} bytes" in message
    assert message.endswith(f"{server.source.url}: slow")
    assert cached.read_bytes() == CONTENT


@pytest.mark.parametrize("corrupt", [CONTENT[:-1], WRONG_BYTE], ids=["short", "wrong byte"])
def test_a_corrupt_cached_file_is_fetched_again(corrupt, server, cached):
    cached.parent.mkdir(parents=True)
    cached.write_bytes(corrupt)
    text = data.load_text(source=server.source)
    assert text == data.Text(SHAKESPEARE.name, CONTENT.decode("utf-8"))
    assert server.ranges == [None]
    assert cached.read_bytes() == CONTENT


def test_a_corrupt_cached_file_is_not_used_without_a_network(source_of, cached):
    cached.parent.mkdir(parents=True)
    cached.write_bytes(CONTENT[:-1])
    assert data.load_text(source=source_of("refused")).name == MANUAL_NAME


@failures
def test_without_a_download_the_stand_in_is_announced_and_nothing_is_cached(
    failure, source_of, cached, capsys
):
    text = data.load_text(source=source_of(failure))
    assert text.name == MANUAL_NAME
    assert len(text.text) > 400_000
    assert MANUAL_NAME in capsys.readouterr().out.partition("NO SHAKESPEARE")[2]
    assert files_below(cached.parents[1]) == []


def test_a_cache_that_cannot_be_written_gives_the_stand_in(server, cached):
    cached.parents[1].write_text("a file where the folder should be", encoding="utf-8")
    assert data.load_text(source=server.source).name == MANUAL_NAME


def test_after_a_broken_download_the_stand_in_is_used_and_the_next_call_completes_it(
    server, cached
):
    server.responses = [BROKEN_OFF, b""]
    assert data.load_text(source=server.source).name == MANUAL_NAME
    assert files_below(cached.parent) == [f"{cached.name}.part"]
    server.responses = [rest(HALF)]
    assert data.load_text(source=server.source).text == CONTENT.decode("utf-8")
    assert files_below(cached.parent) == [cached.name]


# --- The download --------------------------------------------------------------------------------


@failures
def test_a_download_that_fails_raises_and_leaves_no_file(failure, source_of, tmp_path):
    with pytest.raises(FAILURES[failure][1]):
        data.download(source_of(failure), tmp_path / "new" / "input.txt")
    assert files_below(tmp_path) == []
    gc.collect()  # an open connection would warn


def test_wrong_bytes_are_named_and_deleted_and_the_old_file_stays(source_of, tmp_path):
    path, source = tmp_path / "input.txt", source_of("wrong byte")
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=SHA256) as error:
        data.download(source, path)
    assert source.url in str(error.value)
    assert hashlib.sha256(WRONG_BYTE).hexdigest() in str(error.value)
    assert files_below(tmp_path) == ["input.txt"]
    assert path.read_bytes() == b"old"


def test_after_wrong_bytes_the_next_download_starts_over(server, tmp_path):
    """None of them are kept."""
    path = tmp_path / "input.txt"
    server.responses = [response(WRONG_BYTE), response(CONTENT)]
    with pytest.raises(ValueError, match="deleted"):
        data.download(server.source, path)
    data.download(server.source, path)
    assert server.ranges == [None, None]
    assert path.read_bytes() == CONTENT


def test_an_endless_answer_is_not_read_to_its_end(server, tmp_path):
    sent = []

    def endless():
        yield b"HTTP/1.0 200 OK\r\n\r\n"
        for _ in range(1000):  # finite: a download that keeps reading fails instead of hanging
            sent.append(BLOCK)
            yield b"a" * BLOCK

    server.responses = [endless]
    with pytest.raises(ValueError, match="deleted") as error:
        data.download(server.source, tmp_path / "input.txt")
    size = int(str(error.value).split(" gave ")[1].split(" bytes")[0].replace(",", ""))
    assert len(CONTENT) < size <= len(CONTENT) + BLOCK
    assert sum(sent) < 1000 * BLOCK
    assert files_below(tmp_path) == []


def test_a_silent_server_raises_os_error_after_the_timeout(server, tmp_path):
    server.may_respond.clear()
    with pytest.raises(OSError, match="timed out"):
        data.download(server.source, tmp_path / "input.txt", timeout=0.1)
    assert files_below(tmp_path) == []


def test_a_broken_download_resumes_at_once_while_more_arrives(server, tmp_path):
    server.responses = [BROKEN_OFF, rest(HALF, HALF + 5), rest(HALF + 5)]
    data.download(server.source, tmp_path / "input.txt")
    assert server.ranges == [None, f"bytes={HALF}-", f"bytes={HALF + 5}-"]
    assert files_below(tmp_path) == ["input.txt"]
    assert (tmp_path / "input.txt").read_bytes() == CONTENT


# case: (the response to the request for the rest, the exception from download)
NO_MORE = {
    "hangs up": (b"", OSError),
    "empty body": (rest(HALF, HALF), (OSError, http.client.HTTPException)),
    "an error page": (response(b"<p>Sign in first</p>"), (OSError, ValueError)),
    "503": (response(b"later", status="503 Service Unavailable"), OSError),
    "not HTTP": (b"220 mail server ready\r\n", http.client.HTTPException),
}


@pytest.mark.parametrize("no_more", NO_MORE)
def test_the_next_call_resumes_where_the_download_stopped(no_more, server, tmp_path):
    path = tmp_path / "input.txt"
    path.write_bytes(b"old")
    server.responses = [BROKEN_OFF, NO_MORE[no_more][0]]
    with pytest.raises(NO_MORE[no_more][1]):
        data.download(server.source, path)
    assert server.ranges == [None, f"bytes={HALF}-"]
    assert path.read_bytes() == b"old"
    assert (tmp_path / "input.txt.part").read_bytes() == CONTENT[:HALF]

    server.responses = [rest(HALF)]
    data.download(server.source, path)
    assert server.ranges[2:] == [f"bytes={HALF}-"]
    assert path.read_bytes() == CONTENT
    assert files_below(tmp_path) == ["input.txt"]


def test_a_server_without_ranges_starts_over(server, tmp_path):
    (tmp_path / "input.txt.part").write_bytes(CONTENT[:HALF])
    data.download(server.source, tmp_path / "input.txt")
    assert server.ranges == [f"bytes={HALF}-"]  # the response is 200 with the whole file
    assert (tmp_path / "input.txt").read_bytes() == CONTENT
    assert files_below(tmp_path) == ["input.txt"]


def test_a_server_without_ranges_that_breaks_off_again_costs_nothing(server, tmp_path):
    server.responses = [BROKEN_OFF, response(CONTENT[:10], length=len(CONTENT))]
    with pytest.raises((OSError, http.client.HTTPException)):
        data.download(server.source, tmp_path / "input.txt")
    assert len(server.ranges) == 2  # no endless retries
    assert (tmp_path / "input.txt.part").read_bytes() == CONTENT[:HALF]


@pytest.mark.parametrize(
    ("part", "requests"),
    [(b"?" * HALF, 1), (WRONG_BYTE, 0), (CONTENT + b"more", 0)],
    ids=["corrupt", "whole and corrupt", "too long"],
)
def test_a_wrong_part_file_is_detected_and_deleted(part, requests, server, tmp_path):
    (tmp_path / "input.txt.part").write_bytes(part)
    server.responses = [rest(HALF)]
    with pytest.raises(ValueError, match="deleted"):
        data.download(server.source, tmp_path / "input.txt")
    assert len(server.ranges) == requests
    assert files_below(tmp_path) == []


def test_a_whole_part_file_needs_no_network(source_of, tmp_path):
    (tmp_path / "input.txt.part").write_bytes(CONTENT)
    data.download(source_of("refused"), tmp_path / "input.txt")
    assert (tmp_path / "input.txt").read_bytes() == CONTENT
    assert files_below(tmp_path) == ["input.txt"]


def test_an_interrupted_download_keeps_its_bytes(server, tmp_path, monkeypatch):
    """Ctrl-C must not waste minutes of downloading."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data.tqdm, "update", interrupt)  # called after each block
        with pytest.raises(KeyboardInterrupt):
            data.download(server.source, tmp_path / "input.txt")
    assert (tmp_path / "input.txt.part").read_bytes() == CONTENT[:BLOCK]
    server.responses = [rest(BLOCK)]
    data.download(server.source, tmp_path / "input.txt")
    assert server.ranges == [None, f"bytes={BLOCK}-"]
    assert (tmp_path / "input.txt").read_bytes() == CONTENT


@pytest.mark.parametrize("shares_the_part_file", [True, False])
def test_another_process_may_be_faster(shares_the_part_file, server, tmp_path):
    path, part = tmp_path / "input.txt", tmp_path / "input.txt.part"

    def other_process_finishes():
        if shares_the_part_file:
            part.write_bytes(CONTENT)
            os.replace(part, path)
        else:
            path.write_bytes(CONTENT)
        yield response(CONTENT)

    server.responses = [other_process_finishes]
    data.download(server.source, path)
    assert path.read_bytes() == CONTENT
    assert files_below(tmp_path) == ["input.txt"]


@pytest.mark.parametrize(
    ("part", "responses"),
    [
        (b"", [response(CONTENT)]),
        (b"", [BROKEN_OFF, rest(HALF)]),
        (CONTENT[:HALF], [rest(HALF)]),
        (CONTENT[:HALF], [response(CONTENT)]),
    ],
    ids=["at once", "broken off", "in two calls", "from the start"],
)
def test_the_progress_bar_counts_each_byte_once_up_to_the_total(
    part, responses, server, tmp_path, capsys
):
    (tmp_path / "input.txt.part").write_bytes(part)
    server.responses = responses
    data.download(server.source, tmp_path / "input.txt")
    last = capsys.readouterr().err.split("\r")[-1]
    size = tqdm.format_sizeof(len(CONTENT))
    assert SHAKESPEARE.name in last
    assert "100%" in last and f" {size}/{size} " in last
    assert "B/s" in last


@pytest.mark.parametrize("value", [None, ""])
def test_the_cache_is_below_home_unless_xdg_says_otherwise(value, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_dir() == tmp_path / ".cache" / "nala_min"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert data.cache_dir() == tmp_path / "other" / "nala_min"


def test_without_a_home_the_cache_is_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home")))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert data.cache_dir() == tmp_path / "nala_min"


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
def test_a_text_whose_last_tenth_has_no_window_and_target_is_refused(length):
    with pytest.raises(ValueError, match="longer than 80"):
        data.split_text("a" * length, block_size=8)


# --- Windows -------------------------------------------------------------------------------------


def test_random_windows_are_pieces_of_the_text_and_targets_are_shifted_by_one():
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
def test_random_windows_start_everywhere_and_never_run_past_the_end(num_windows):
    block = 8
    inputs, targets = random_windows(torch.arange(block + num_windows), block, 200, seed=1, step=0)
    assert set(inputs[:, 0].tolist()) == set(range(num_windows))
    assert targets.max() == block + num_windows - 1


def test_windows_do_not_depend_on_torch_s_defaults():
    def make():
        _, training, _ = data.split_text("Der Rabe flog im Mai. " * 9, 8)
        return [*data.random_windows(training, 8, 4, seed=1, step=0), training]

    assert_independent_of_defaults(make)


@pytest.mark.parametrize(("length", "left_over"), [(9, 0), (16, 7), (17, 0), (100, 3)])
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_all_windows_predict_each_token_once_except_an_incomplete_last_window(
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
