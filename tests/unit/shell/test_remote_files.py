"""A file of ranges reads like one on disk, holds few of its blocks, and tells what does not arrive."""

import hashlib
import io
import os
import random
import threading
import time
from collections.abc import Callable

import pytest

from finetune_trainer.errors import StorageError
from finetune_trainer.storage import remote_files
from finetune_trainer.storage.remote_files import AHEAD, RemoteFile

BLOCK = 1000
CONTENT = random.Random(1).randbytes(40 * BLOCK + 7)


class Server:
    """Gives ranges of the content, and counts."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content, self.asked, self.lock = content, list[tuple[int, int]](), threading.Lock()

    def __call__(self, start: int, end: int, wanted: Callable[[], bool]) -> bytes:
        with self.lock:
            self.asked.append((start, end))
        return self.content[start:end]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "BLOCK", BLOCK)
    monkeypatch.setattr(remote_files, "_BUFFER", 64)


def test_it_reads_like_a_file_from_anywhere() -> None:
    draw = random.Random(2)
    with RemoteFile("s3://b/x", len(CONTENT), Server()) as file, file.open("rb") as here:
        there = io.BytesIO(CONTENT)
        for _ in range(500):
            match draw.randrange(4):
                case 0:
                    place = draw.randrange(len(CONTENT) + 100)
                    assert here.seek(place) == there.seek(place)
                case 1:
                    place = draw.randrange(-BLOCK, 0)
                    assert here.seek(place, os.SEEK_END) == there.seek(place, os.SEEK_END)
                case _:
                    count = draw.randrange(3 * BLOCK)
                    assert here.read(count) == there.read(count)
            assert here.tell() == there.tell() and len(file._held) <= AHEAD
        assert file.sha256() == hashlib.sha256(CONTENT).hexdigest()


def test_in_order_each_block_is_fetched_once_and_few_are_held() -> None:
    server = Server()
    with RemoteFile("s3://b/x", len(CONTENT), server) as file, file.open() as reader:
        first = reader.read(BLOCK // 2)
        assert list(file._held) == [0, 1], "whoever reads on gets more and more ahead"
        parts = [first]
        while part := reader.read(300):
            parts.append(part)
            assert len(file._held) <= AHEAD
        assert max(end for _, end in server.asked) == len(CONTENT)
        assert b"".join(parts) == CONTENT and file.sha256() == hashlib.sha256(CONTENT).hexdigest()
        assert file.arrived == len(CONTENT)
    assert sorted(server.asked) == [(i, min(i + BLOCK, len(CONTENT))) for i in range(0, len(CONTENT), BLOCK)]


def test_the_digest_is_of_the_whole_whatever_was_read() -> None:
    server = Server()
    with RemoteFile("s3://b/x", len(CONTENT), server) as file, file.open() as reader:
        reader.seek(-10, os.SEEK_END)
        reader.read()
        reader.seek(5 * BLOCK)
        reader.read(10)
        reader.seek(0)
        reader.read(3 * BLOCK)
        assert file.sha256() == hashlib.sha256(CONTENT).hexdigest()


class Hanging(Server):
    """Gives no block behind the eighth till it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.closed = threading.Event(), threading.Event()
        self.wanted = dict[int, Callable[[], bool]]()

    def __call__(self, start: int, end: int, wanted: Callable[[], bool]) -> bytes:
        self.wanted[start // BLOCK] = wanted
        found = super().__call__(start, end, wanted)
        assert start < AHEAD * BLOCK or self.go.wait(60)
        return found


def test_who_waits_may_stop_and_who_leaves_waits_for_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "PATIENCE", 0.01)
    server = Hanging()
    asked = iter(range(1000))

    def stop() -> None:
        if next(asked) > 2:
            raise InterruptedError

    began = time.monotonic()
    with RemoteFile("s3://b/x", len(CONTENT), server, server.closed.set) as file:
        file.open().read(AHEAD * BLOCK)
        file.check_stop = stop
        for number in (20, 30):  # the last thread, and none
            asked = iter(range(1000))
            with pytest.raises(InterruptedError):
                file.read_at(number * BLOCK, 1)
        assert not server.wanted[AHEAD](), "nobody waits for what was jumped away from"
    assert time.monotonic() - began < 30 and not any(wanted() for wanted in server.wanted.values())
    assert not server.closed.is_set(), "not while something arrives"
    server.go.set()
    assert server.closed.wait(60)
    assert {20 * BLOCK, 30 * BLOCK} & {start for start, _ in server.asked} == {20 * BLOCK}


def test_less_than_was_asked_for_is_no_end() -> None:
    with (
        RemoteFile("s3://b/x", len(CONTENT), Server(CONTENT[: 3 * BLOCK + 5])) as file,
        pytest.raises(StorageError, match="s3://b/x: 5 bytes arrived instead of 1000, from 3000 on"),
    ):
        file.open().read()


def test_an_empty_one_has_no_block() -> None:
    server = Server(b"")
    with RemoteFile("s3://b/x", 0, server) as file:
        assert file.open().read() == b"" and file.sha256() == hashlib.sha256(b"").hexdigest() and not server.asked
