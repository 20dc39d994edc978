"""Processes that make images side by side. Threads do not do it: half of the work is Python's, and the more of them there are, the more they wait for each other.

What is made is written into memory that all share. A process that waits for work ends when nobody is there to ask. Called by pixels.
"""

import mmap
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor

ROOM: Final = 8
"""Images of a process that have room in memory."""

Call = tuple[Any, ...]


class WorkersLost(Exception):
    """A process was killed, or could not make an image: make them elsewhere, and hear why."""


class ImageWorkers:
    """Processes for one maker of images."""

    def __init__(self, make: Callable[..., Tensor], like: Tensor, count: int, imports: Sequence[str] = ()) -> None:
        """Takes seconds.

        Args:
            make: gives an image of what it is called with; it and that are pickled.
            like: an image, as they all are in shape and type.
            count: processes.
            imports: modules that are imported once, before processes are forked.

        Raises:
            OSError: there is no memory to share.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *imports])
        self._count, self._like = count, like
        self.processes = []
        self._connections: list[Connection] = []
        with _shared_file(count * ROOM * like.nbytes) as file:
            self._memory = _images(file.fileno(), like.shape, like.dtype)
            for _ in range(count):
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(there, make, tuple(like.shape), like.dtype), daemon=True)
                process.start()
                there.close()
                reduction.send_handle(here, file.fileno(), process.pid)
                self.processes.append(process)
                self._connections.append(here)

    def __call__(self, calls: Sequence[Call]) -> Tensor:
        """(images, *shape of one): the image of each call, in their order.

        Raises:
            WorkersLost: they are of no use any more.
        """
        made = torch.empty(len(calls), *self._like.shape, dtype=self._like.dtype)
        for begin in range(0, len(calls), len(self._memory)):
            now = calls[begin : begin + len(self._memory)]
            each = -(-len(now) // self._count)
            busy = list(zip(self._connections, range(0, len(now), each), strict=False))
            try:
                for connection, at in busy:
                    connection.send((at, now[at : at + each]))
                failed = [said for connection, _ in busy if (said := connection.recv())]
            except (OSError, EOFError) as error:
                raise WorkersLost("a process that makes images was killed") from error
            if failed:
                raise WorkersLost(f"a process that makes images failed with {failed[0]}")
            made[begin : begin + len(now)] = self._memory[: len(now)]
        return made


def _work(connection: Connection, make: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of each process: makes what it is told to, and says the type of what went wrong, or nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    memory = _images(reduction.recv_handle(connection), shape, dtype)
    while True:
        try:
            begin, calls = connection.recv()
        except (OSError, EOFError):
            return
        try:
            for i, call in enumerate(calls, begin):
                image = make(*call)
                if image.shape != shape or image.dtype != dtype:
                    raise ValueError("an image has another shape or type")
                memory[i] = image
            said = ""
        except Exception as error:
            said = type(error).__name__
        connection.send(said)


def _shared_file(size: int) -> IO[bytes]:
    """A file without a name, all of which is there: in memory, or where there is too little of it for that on disk."""
    for folder in ("/dev/shm", tempfile.gettempdir()):
        if Path(folder).is_dir():
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            try:
                os.posix_fallocate(file.fileno(), 0, size)
                return file
            except OSError:
                file.close()
    raise OSError(f"there is no room for {size} bytes to share")


def _images(file: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """(images, *shape): what a file holds, to be written by all."""
    content = torch.frombuffer(mmap.mmap(file, os.fstat(file).st_size), dtype=torch.uint8)
    return content.view(dtype).view(-1, *shape)
