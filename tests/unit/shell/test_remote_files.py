"""A file of ranges reads like one on disk, holds few of its blocks, and tells what does not arrive."""

import hashlib
import io
import os
import random
import threading

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

    def __call__(self, start: int, end: int) -> bytes:
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


def test_who_leaves_waits_for_no_further_block() -> None:
    closed: list[bool] = []
    server = Server()
    with RemoteFile("s3://b/x", len(CONTENT), server, lambda: closed.append(True)) as file:
        file.open().read(10 * BLOCK)
    assert closed and len(server.asked) <= 10 + AHEAD + 1


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
