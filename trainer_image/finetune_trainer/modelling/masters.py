"""Trained weights in fp32, their gradients and the optimizer's state, each in one flat vector.

Flat, because then the exchange between ranks, the norm, the clipping and the optimizer are each one call on one tensor whatever the model.
Several ranks divide the vector (partition): each holds the fp32 weights and the optimizer's state of its part only, gets the sum of the
gradients of that part, updates it and hands the result to the others, which is what one sum for all costs, too. A gradient too large for
every rank to hold whole is divided as well (gradients).

What the model computes with is one vector, too: the fp32 weights themselves where it computes in fp32, else copies that `refresh` makes
once a step: 98 % of bf16 weights do not move at an update of 1e-5. Gradients add up in fp32 across micro-batches.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from finetune_crds.resolved import ResolvedAdamW

from ..ranks import Ranks
from . import optimizers
from .gradients import DividedGradient, Gradient, WholeGradient
from .norms import batch_norms
from .optimizers import BLOCK
from .partition import Chunk, Part, Partition

SLICE: Final = 1 << 24
"""Weights that the optimizer updates at a time: bounds its temporary memory, and fits caches."""
WHOLE_GRADIENT: Final = 1 << 31
"""Trained weights up to which each rank holds the gradient of all of them, of 8 GiB then."""


@dataclass(frozen=True)
class Group:
    """Trained weights that share a learning rate and a beginning."""

    names: tuple[str, ...]
    rate: float = 1.0
    """Their learning rate as a multiple of the job's."""
    start: int = 0
    """Steps before they begin: warm-up, schedule and optimizer count from here, and until then they keep each bit."""


class _Entry(NamedTuple):
    """A tensor of the state, as it lies in one of the vectors."""

    vector: Tensor
    """What this rank holds of it."""
    start: int
    """In the whole vector, in elements of it."""
    shape: torch.Size
    grain: int
    """Weights to an element."""


class Masters:
    """The trained weights of a model and an optimizer over them, with decay on matrices only.

    Weights lie group by group, so that each group's learning rate, beginning and count of steps is that of one stretch of the vector.
    """

    def __init__(
        self,
        model: nn.Module,
        compute: torch.dtype,
        settings: ResolvedAdamW,
        groups: Sequence[Group] | None = None,
        *,
        pull: float = 0.0,
        fresh: tuple[str, ...] = (),
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            model: holds the weights, the same on each rank; those that require a gradient are trained.
            compute: what it computes in.
            settings: of the optimizer.
            groups: of the trained weights; default one.
            pull: L2-SP: decay towards what the weights are now.
            fresh: modules that begin from nothing that they should stay near.
            ranks: that train together; default one. Weights move to its device one by one: there is no room for all in fp32. The rest
                of the model is for the caller to move.
        """
        self._ranks = ranks or Ranks()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.groups = tuple(groups or [Group(tuple(trained))])
        listed = [name for group in self.groups for name in group.names]
        if sorted(listed) != sorted(trained):
            raise ValueError("every trained weight must be in exactly one group")
        self._parameters: dict[str, nn.Parameter] = {}
        self._starts: dict[str, int] = {}
        stretches: list[list[tuple[int, int, bool]]] = []
        total = 0  # weights begin at whole blocks: at addresses that every kernel takes, and no two share a scale of 8-bit moments
        for group in self.groups:
            own: list[tuple[int, int, bool]] = []
            for matrices in (False, True):  # what lies in all blocks shares a chunk with what a backward pass ends with
                start = total
                for name in group.names:
                    if (trained[name].ndim >= 2) == matrices:
                        self._parameters[name] = trained[name]
                        self._starts[name] = total
                        total += math.ceil(trained[name].numel() / BLOCK) * BLOCK
                own += [(at, min(at + SLICE, total), matrices) for at in range(start, total, SLICE)]
            stretches.append(own)
        self._partition = Partition(total, self._ranks.rank, self._ranks.world)
        self._stretches: list[list[tuple[Part, bool]]] = [
            [(part, matrices) for start, end, matrices in own for part in self._partition.owned(start, end)]
            for own in stretches
        ]
        """Of each group: the stretches of this rank in which it is updated, and whether they are matrices."""
        self._extents = [(own[0][0], own[-1][1]) if own else (0, 0) for own in stretches]
        """Where each group starts and ends."""

        norms = batch_norms(model)
        self._norms = {name: norm for name, norm in norms.items() if f"{name}.weight" in trained}
        exact = {name for name in trained if name.rpartition(".")[0] in norms}
        device = self._ranks.device
        self.weights = torch.zeros(self._partition.length, dtype=torch.float32, device=device)
        """In fp32, of this rank's part."""
        seen = torch.float32 if exact else compute
        alone = self._ranks.world == 1
        self._seen = (
            self.weights
            if alone and seen == torch.float32
            else torch.zeros(self._partition.size, dtype=seen, device=device)
        )
        """What the model computes with: the whole vector, which parameters are views of, or copies where they compute in another type."""
        for name, parameter in self._parameters.items():
            self._take(self._entry(self.weights, name), parameter.data)
            view = self._view(self._seen, name)
            view.copy_(parameter.data)
            parameter.data = view if name in exact or seen == compute else parameter.data.to(device, compute)

        kind = DividedGradient if not alone and self._partition.size > WHOLE_GRADIENT else WholeGradient
        self.gradient: Gradient = kind(trained, self._starts, self._partition, self._ranks)
        self.optimizer = optimizers.make(self.weights, settings)

        self._pull = pull
        self._origin = self.weights.clone() if pull else None
        self._pulled = (
            {name for name in self._parameters if not name.startswith(tuple(f"{one}." for one in fresh))}
            if pull
            else set()
        )

    def __len__(self) -> int:
        """Weights that are trained."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What training changes besides: running statistics of batch normalisation that is trained, as the model holds them, by name."""
        return {
            f"{name}.{buffer}": tensor for name, norm in self._norms.items() for buffer, tensor in norm.named_buffers()
        }

    @property
    def origin(self) -> list[Tensor]:
        """What L2-SP pulls to, if it does."""
        return [] if self._origin is None else [self._origin]

    @property
    def names(self) -> list[str]:
        """Names of the trained weights."""
        return list(self._parameters)

    # What of it leaves and comes back

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that training changes, by name, dealt out to the ranks in turn. All ranks, to the end: they exchange it on the way.

        Running statistics are the first rank's: of those that are counts each has its own, and that rank publishes.
        """
        entries = self._entries()
        dealt = set(list(entries)[self._ranks.rank :: self._ranks.world])
        yield from self._gathered(entries, dealt)
        if self._ranks.first:
            yield from ((f"buffer/{name}", buffer) for name, buffer in self.buffers.items())

    def trained(self) -> dict[str, Tensor]:
        """Weights in fp32 and running statistics, by name; of several ranks on the first, in the host's memory. All ranks."""
        entries = {name: self._entry(self.weights, name) for name in self._parameters}
        return dict(self._gathered(entries, set(entries) if self._ranks.first else set())) | self.buffers

    def load(self, state: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over all that `state` gave on all ranks. All ranks.

        Raises:
            KeyError: something is missing.
        """
        self._load(state, self._entries())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over weights and running statistics only: what is published need not be what training ended with. All ranks.

        Raises:
            KeyError: something is missing.
        """
        named = ((f"{'buffer' if name in self.buffers else 'weight'}/{name}", tensor) for name, tensor in weights)
        self._load(named, {f"weight/{name}": self._entry(self.weights, name) for name in self._parameters})

    def _load(self, state: Iterable[tuple[str, Tensor]], entries: dict[str, _Entry]) -> None:
        missing = entries.keys() | {f"buffer/{name}" for name in self.buffers}
        for name, tensor in state:
            missing.remove(name)
            if name in entries:
                self._take(entries[name], tensor)
            else:
                self.buffers[name.removeprefix("buffer/")].copy_(tensor)
        if missing:
            raise KeyError(min(missing))
        self._refresh(self._partition.chunks)

    def _entries(self) -> dict[str, _Entry]:
        """All of the state that lies in vectors."""
        vectors = {"weight": self.weights, **self.optimizer.moments}
        entries = {
            f"{part}/{name}": self._entry(vector, name) for part, vector in vectors.items() for name in self._parameters
        }
        return entries | {
            f"{part}-scales/{name}": self._entry(scales, name, BLOCK)
            for part, scales in self.optimizer.scales.items()
            for name in self._parameters
        }

    def _entry(self, vector: Tensor, name: str, grain: int = 1) -> _Entry:
        shape = self._parameters[name].shape
        if grain > 1:
            shape = torch.Size([math.ceil(shape.numel() / grain)])
        return _Entry(vector, self._starts[name] // grain, shape, grain)

    def _gathered(self, entries: dict[str, _Entry], wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Those entries that are wanted here, whole: views where this rank has all of them, else in the host's memory."""
        if self._ranks.world == 1:
            for name, (vector, start, shape, _) in entries.items():
                if name in wanted:
                    yield name, vector[start : start + shape.numel()].view(shape)
            return
        vectors = {id(entry.vector): entry for entry in entries.values()}
        for vector, *_, grain in vectors.values():
            waiting = [(name, entry) for name, entry in entries.items() if entry.vector is vector]
            made: dict[str, Tensor] = {}
            for start, end, mine in self._partition.chunks:
                first, last = start // grain, end // grain
                chunk = vector.new_empty(last - first)
                # A copy: moments may be paged, which is no memory to exchange.
                self._ranks.all_gather_(chunk, vector[mine.own[0] // grain : mine.own[1] // grain].clone())
                while waiting and waiting[0][1].start < last:
                    name, entry = waiting[0]
                    stop = entry.start + entry.shape.numel()
                    if name in wanted:
                        if name not in made:
                            made[name] = torch.empty(entry.shape.numel(), dtype=vector.dtype)
                        here, there = max(entry.start, first), min(stop, last)
                        made[name][here - entry.start : there - entry.start] = chunk[here - first : there - first]
                    if stop > last:
                        break
                    waiting.pop(0)
                    if name in wanted:
                        yield name, made.pop(name).view(entry.shape)

    def _take(self, entry: _Entry, tensor: Tensor) -> None:
        """Puts this rank's parts of a whole tensor into their vector."""
        vector, start, shape, grain = entry
        if tensor.shape != shape:
            raise ValueError(f"a tensor of {list(tensor.shape)} for one of {list(shape)}")
        flat = tensor.reshape(-1)
        for first, own in self._partition.owned(start * grain, (start + shape.numel()) * grain):
            begin, end = own[0] // grain, own[1] // grain
            offset = first // grain - start
            vector[begin:end].copy_(flat[offset : offset + end - begin])

    # A step

    def begin(self, step: int) -> None:
        """Lets gradients flow to the groups that have begun after `step` steps, and to no others."""
        begun: set[int] = set()
        for group, extent in zip(self.groups, self._extents, strict=True):
            for name in group.names:
                self._parameters[name].requires_grad_(group.start <= step)
            if group.start <= step:
                begun |= {chunk.start for chunk in self._partition.across(*extent)}
        self.gradient.begin([chunk for chunk in self._partition.chunks if chunk.start in begun])

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Backward passes here, of all groups whether they have begun or not, leave nothing: no gradient, and no word to other ranks."""
        self.begin(max(group.start for group in self.groups))
        self.gradient.rehearsing = True
        try:
            yield
        finally:
            self.gradient.rehearsing = False

    def collect(self) -> None:
        """Takes in the gradients of one backward pass."""
        self.gradient.collect()

    def add_up(self, more: int) -> None:
        """Makes the gradient that of all ranks, and running statistics the mean of what each has seen. All ranks.

        Args:
            more: backward passes that other ranks have had and this one has not.
        """
        if self._ranks.world == 1:
            return
        self.gradient.add_up(more)
        means = [buffer for buffer in self.buffers.values() if buffer.is_floating_point()]
        if means:
            flat = torch.cat([buffer.flatten() for buffer in means])
            self._ranks.sum_(flat)
            parts = torch.split(flat.div_(self._ranks.world), [buffer.numel() for buffer in means])
            for buffer, mean in zip(means, parts, strict=True):
                buffer.copy_(mean.view_as(buffer))

    def own_gradient(self) -> list[Tensor]:
        """Behind `add_up`: the gradient of this rank's part."""
        return [self.gradient.of(chunk.mine) for chunk in self.gradient.begun]

    def norm(self) -> Tensor:
        """L2 norm of the gradient of this rank's part."""
        own = [torch.linalg.vector_norm(part) for part in self.own_gradient()]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(own)) if len(own) > 1 else own[0]
        return norm

    def step(self, done: int, rates: Sequence[float], weight_decay: float, scale: float = 1.0) -> None:
        """One update of the groups that have begun; then the gradient is zero again. All ranks.

        Args:
            done: updates before this one.
            rates: learning rate of each group.
            weight_decay: of matrices.
            scale: of the gradient.
        """
        if scale != 1:
            for gradient in self.own_gradient():
                gradient.mul_(scale)
        for group, rate, stretches in zip(self.groups, rates, self._stretches, strict=True):
            number = done - group.start + 1
            if number < 1:
                continue
            if self._origin is not None:
                for name in self._pulled.intersection(group.names):
                    start = self._starts[name]
                    for part in self._partition.owned(start, start + self._parameters[name].numel()):
                        own = slice(*part.own)
                        self.weights[own].lerp_(self._origin[own], rate * self._pull)
            for part, matrices in stretches:
                decay = weight_decay if matrices else 0.0
                weights = self.weights[slice(*part.own)]
                self.optimizer.update(part.own, weights, self.gradient.of(part), number, rate, decay)
        self.gradient.vector.zero_()
        self.refresh()

    def refresh(self) -> None:
        """Gives the model the weights that it computes with, of what is trained yet. All ranks."""
        self._refresh(self.gradient.begun)

    def _refresh(self, chunks: Sequence[Chunk]) -> None:
        if self._seen is not self.weights:
            for start, end, mine in chunks:
                own = self._seen[slice(*mine.whole)]
                own.copy_(self.weights[slice(*mine.own)])
                self._ranks.all_gather_(self._seen[start:end], own)
        for name, parameter in self._parameters.items():
            if parameter.dtype != self._seen.dtype:
                parameter.data.copy_(self._view(self._seen, name))

    def _view(self, vector: Tensor, name: str) -> Tensor:
        start = self._starts[name]
        parameter = self._parameters[name]
        return vector[start : start + parameter.numel()].view(parameter.shape)
