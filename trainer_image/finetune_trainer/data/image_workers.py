"""Processes that make images side by side. Threads do not do it: half of the work is Python's, and the more of them there are, the more they wait for each other.

What is made is written into memory that all share. A process that waits for work ends when nobody is there to ask. Called by pixels.
"""

import math
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
Images = dict[str, Tensor]
"""What is made of images, or of one, by name."""
_Forms = dict[str, tuple[tuple[int, ...], torch.dtype]]


class WorkersLost(Exception):
    """A process was killed, or could not make an image: make them elsewhere, and hear why."""


class ImageWorkers:
    """Processes for one maker of images."""

    def __init__(self, make: Callable[..., Images], like: Images, count: int, imports: Sequence[str] = ()) -> None:
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
        self._count, self._forms = count, {name: (tuple(one.shape), one.dtype) for name, one in like.items()}
        self.processes = []
        self._connections: list[Connection] = []
        with _shared_file(count * ROOM * sum(one.nbytes for one in like.values())) as file:
            self._memory = _images(file.fileno(), self._forms, count * ROOM)
            for _ in range(count):
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(there, make, self._forms, count * ROOM), daemon=True)
                process.start()
                there.close()
                reduction.send_handle(here, file.fileno(), process.pid)
                self.processes.append(process)
                self._connections.append(here)

    def __call__(self, calls: Sequence[Call]) -> Images:
        """(images, *shape of one) each: the image of each call, in their order.

        Raises:
            WorkersLost: they are of no use any more.
        """
        made = {name: torch.empty(len(calls), *shape, dtype=dtype) for name, (shape, dtype) in self._forms.items()}
        room = self._count * ROOM
        for begin in range(0, len(calls), room):
            now = calls[begin : begin + room]
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
            for name, memory in self._memory.items():
                made[name][begin : begin + len(now)] = memory[: len(now)]
        return made


def _work(connection: Connection, make: Callable[..., Images], forms: _Forms, room: int) -> None:
    """Of each process: makes what it is told to, and says the type of what went wrong, or nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    memory = _images(reduction.recv_handle(connection), forms, room)
    while True:
        try:
            begin, calls = connection.recv()
        except (OSError, EOFError):
            return
        try:
            for i, call in enumerate(calls, begin):
                image = make(*call)
                if {name: (tuple(one.shape), one.dtype) for name, one in image.items()} != forms:
                    raise ValueError("an image has another shape or type")
                for name, one in image.items():
                    memory[name][i] = one
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


def _images(file: int, forms: _Forms, room: int) -> Images:
    """(images, *shape) each, one name behind the other: what a file holds, to be written by all. Of ROOM images each begins where a number may."""
    memory = mmap.mmap(file, os.fstat(file).st_size)
    found, at = {}, 0
    for name, (shape, dtype) in forms.items():
        content = torch.frombuffer(memory, dtype=dtype, count=room * math.prod(shape), offset=at)
        found[name] = content.view(room, *shape)
        at += content.nbytes
    return found
