"""A remote file that is read as it arrives and never stored: the one that is too large for scratch. Called by downloads, which asks for its ranges.

Blocks are fetched as they are read, and further ones while they are read in order; what is held of them is bounded, however large the file.
"""

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Thread
from typing import Any, Final, Literal, Self

from ..errors import StorageError

BLOCK = 16 * 1024 * 1024
"""Bytes that are asked for at a time."""
AHEAD: Final = 8
"""Blocks that are held, at most. As many may be on their way to nobody: where a reader jumped, and what had begun to arrive does not end at once."""
PATIENCE = 1.0
"""Seconds between questions whether to stop, while a block does not come."""
_BUFFER: Final = 256 * 1024


class RemoteFile:
    """One version of a file. It is opened as often as one likes, like a Path, and read by one reader at a time."""

    def __init__(
        self,
        uri: str,
        size: int,
        fetch: Callable[[int, int, Callable[[], bool]], Any],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            uri: what messages call it.
            size: bytes.
            fetch: the bytes from one place till before another, of this very version. Called in several threads. Raises UserError, StorageError;
                whatever it likes once its third argument says that nobody wants them any more.
            close: what to do when nobody reads it any more and nothing arrives.
        """
        self.uri, self.size = uri, size
        self.arrived = 0
        """Bytes that readers got; those that were read again count again."""
        self.check_stop: Callable[[], None] = lambda: None
        """Called before and while one waits for a block; raises to stop."""
        self._fetch, self._close, self._block = fetch, close, BLOCK
        self._threads = ThreadPoolExecutor(AHEAD)
        self._held: dict[int, Future[Any]] = {}
        self._wanted = range(0)
        self._last, self._in_order = -1, 0
        self._hash, self._hashed = hashlib.sha256(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for nothing that still arrives."""
        self._wanted = range(0)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._held.clear()
        Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        self._threads.shutdown()
        self._close()

    def open(self, mode: Literal["rb"] = "rb") -> io.BufferedReader:
        """A reader, at its beginning. It seeks, too. Reading raises what `fetch` does."""
        return io.BufferedReader(_Reader(self), _BUFFER)

    def sha256(self) -> str:
        """Hex, of the whole content. What was not read yet, or not in order, is fetched."""
        while self._hashed * self._block < self.size:
            self._content(self._hashed)
        return self._hash.hexdigest()

    def read_at(self, place: int, count: int) -> memoryview:
        """At most so many bytes from a place on: those that one block has; none behind the end."""
        if place >= self.size:
            return memoryview(b"")
        number, start = divmod(place, self._block)
        found = self._content(number)[start : start + count]
        self.arrived += len(found)
        return found

    def _content(self, number: int) -> memoryview:
        """A block. Reading on in order begins with one further and ends with as many as may be held."""
        if number != self._last:
            self.check_stop()
            self._in_order = self._in_order + 1 if number == self._last + 1 else 0
            self._last = number
            end = min(number + 1 + min(self._in_order, AHEAD - 1), -(-self.size // self._block))
            self._wanted = range(number, end)
            for other in [other for other in self._held if other not in self._wanted]:
                self._held.pop(other).cancel()
            for other in self._wanted:
                if other not in self._held:
                    self._held[other] = self._threads.submit(self._whole, other)
        while not wait([self._held[number]], PATIENCE).done:
            self.check_stop()
        content = memoryview(self._held[number].result())
        if number == self._hashed:
            self._hash.update(content)
            self._hashed += 1
        return content

    def _whole(self, number: int) -> Any:
        start, end = number * self._block, min((number + 1) * self._block, self.size)
        content = self._fetch(start, end, lambda: number in self._wanted)
        if len(content) != end - start:
            raise StorageError(f"{self.uri}: {len(content)} bytes arrived instead of {end - start}, from {start} on")
        return content


class _Reader(io.RawIOBase):
    def __init__(self, file: RemoteFile) -> None:
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._file.size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        found = self._file.read_at(self._place, len(buffer))
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)
