"""The gradient of all trained weights in fp32, one flat vector, added up over micro-batches and ranks. Called by masters.

Whole: each rank holds all of it, and what ranks have is summed once a step. Divided: each rank holds its part, and a chunk is summed as soon
as a backward pass has computed it, while it goes on with the next (ZeRO's second stage); so gradients of the model's own type are few at
a time, as long as each weight has one, and a step with several micro-batches says as much to the other ranks several times.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..ranks import Ranks
from .partition import Chunk, Part, Partition


class Gradient(ABC):
    """What masters asks."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], starts: Mapping[str, int], partition: Partition, ranks: Ranks
    ) -> None:
        """
        Args:
            parameters: the trained weights, in the order of the model's forward pass.
            starts: where each lies in the vector.
            partition: of the vector.
            ranks: that divide it.
        """
        self._parameters = parameters
        self._starts = starts
        self._partition = partition
        self._ranks = ranks
        self.begun: Sequence[Chunk] = partition.chunks
        """The chunks in which something is trained yet."""
        device = next(iter(parameters.values())).device
        self.vector = torch.zeros(self._length(), dtype=torch.float32, device=device)
        """What this rank holds of it."""
        self.rehearsing = False
        """Whether gradients are dropped as soon as they are there."""
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(self._unless_rehearsed(self._hook(name)))  # type: ignore[no-untyped-call]

    def begin(self, chunks: Sequence[Chunk]) -> None:
        """From now on there are gradients in these chunks only."""
        self.begun = chunks

    @abstractmethod
    def collect(self) -> None:
        """Behind each backward pass."""

    @abstractmethod
    def add_up(self, more: int) -> None:
        """Makes it that of all ranks, each in its part. All ranks.

        Args:
            more: backward passes that other ranks have had and this one has not.
        """

    @abstractmethod
    def of(self, part: Part) -> Tensor:
        """A view of a stretch that this rank owns."""

    @property
    def in_flight(self) -> int:
        """Bytes on the device, at most, of what is on its way to other ranks in a backward pass."""
        return 0

    @abstractmethod
    def _length(self) -> int:
        """Of what this rank holds."""

    @abstractmethod
    def _hook(self, name: str) -> Callable[[Tensor], None]:
        """What is called when a weight's gradient is there, on a GPU by a thread of its own."""

    def _unless_rehearsed(self, hook: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def called(parameter: Tensor) -> None:
            if self.rehearsing:
                parameter.grad = None
            else:
                hook(parameter)

        return called


class WholeGradient(Gradient):
    """On each rank."""

    def collect(self) -> None:
        """See Gradient. Each was taken in when it was there."""

    def add_up(self, more: int) -> None:
        """See Gradient."""
        sums = [self._ranks.reduce_scatter_(self.vector[start:end], self.of(mine)) for start, end, mine in self.begun]
        for wait in sums:
            wait()

    def of(self, part: Part) -> Tensor:
        """See Gradient."""
        return self.vector[slice(*part.whole)]

    def _length(self) -> int:
        return self._partition.size

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        start, parameter = self._starts[name], self._parameters[name]
        view = self.vector[start : start + parameter.numel()].view(parameter.shape)

        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            view.add_(parameter.grad)
            parameter.grad = None

        return collect


class DividedGradient(Gradient):
    """Each rank holds its part.

    Chunks are summed in one order on all ranks, the order in which a backward pass should complete them: from the chunk whose first weight
    in the forward pass comes last to the one whose comes first. One that is complete before its turn waits.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], starts: Mapping[str, int], partition: Partition, ranks: Ranks
    ) -> None:
        super().__init__(parameters, starts, partition, ranks)
        self._chunks_of = {
            name: partition.across(starts[name], starts[name] + parameter.numel())
            for name, parameter in parameters.items()
        }
        self._in: dict[int, list[str]] = {chunk.start: [] for chunk in partition.chunks}
        """Weights that lie in a chunk, or partly, in the order of the forward pass, by where it starts."""
        for name, chunks in self._chunks_of.items():
            for chunk in chunks:
                self._in[chunk.start].append(name)
        place = {name: number for number, name in enumerate(parameters)}
        first = {start: min((place[name] for name in inside), default=-1) for start, inside in self._in.items()}
        self._order = sorted(partition.chunks, key=lambda chunk: first[chunk.start])
        """The last one is complete first."""
        self._waiting: list[Chunk] = []
        """Of this backward pass, the next one last."""
        self._missing: dict[int, set[str]] = {}
        """Weights of a chunk that have no gradient of this backward pass yet."""
        self._left: dict[str, int] = {}
        """Chunks that a gradient is still needed for."""
        self._on_its_way: Callable[[], None] | None = None
        self._expect()

    def begin(self, chunks: Sequence[Chunk]) -> None:
        """See Gradient."""
        super().begin(chunks)
        self._expect()

    def collect(self) -> None:
        """See Gradient. Sums what has not been complete: all ranks, as often."""
        while self._waiting:
            self._exchange(self._waiting.pop())
        self._arrive()
        if any(parameter.grad is not None for parameter in self._parameters.values()):
            raise RuntimeError("a backward pass has computed the gradient of a weight twice")
        self._expect()

    def add_up(self, more: int) -> None:
        """See Gradient."""
        for _ in range(more):
            self.collect()

    def of(self, part: Part) -> Tensor:
        """See Gradient."""
        return self.vector[slice(*part.own)]

    @property
    def in_flight(self) -> int:
        """See Gradient. Two chunks in fp32."""
        return 2 * 4 * max(chunk.end - chunk.start for chunk in self._partition.chunks)

    def _length(self) -> int:
        return self._partition.length

    def _expect(self) -> None:
        """The next backward pass."""
        begun = set(self.begun)
        self._waiting = [chunk for chunk in self._order if chunk in begun]
        self._missing = {
            chunk.start: {name for name in self._in[chunk.start] if self._parameters[name].requires_grad}
            for chunk in self.begun
        }
        self._left = {name: len(chunks) for name, chunks in self._chunks_of.items()}

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def collect(_: Tensor) -> None:
            for chunk in self._chunks_of[name]:
                self._missing[chunk.start].discard(name)
            while self._waiting and not self._missing[self._waiting[-1].start]:
                self._exchange(self._waiting.pop())

        return collect

    def _exchange(self, chunk: Chunk) -> None:
        """Begins to sum a chunk over ranks; the one before it has to have arrived, so that two are on the device at a time."""
        start, end, mine = chunk
        tensor = torch.zeros(end - start, dtype=torch.float32, device=self.vector.device)
        for name in self._in[start]:
            parameter, first = self._parameters[name], self._starts[name]
            if parameter.grad is not None:
                here, there = max(first, start), min(first + parameter.numel(), end)
                tensor[here - start : there - start] = parameter.grad.reshape(-1)[here - first : there - first]
            self._left[name] -= 1
            if not self._left[name]:
                parameter.grad = None
        own = tensor[mine.start - start : mine.whole[1] - start]
        wait = self._ranks.reduce_scatter_(tensor, own)
        self._arrive()

        def arrived() -> None:
            wait()
            self.of(mine).add_(own)

        self._on_its_way = arrived

    def _arrive(self) -> None:
        if self._on_its_way:
            self._on_its_way()
            self._on_its_way = None
