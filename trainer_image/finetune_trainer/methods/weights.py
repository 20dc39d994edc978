"""Training the model's own weights: all of them, some of them, or more and more of them from the head downwards."""

import itertools
import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import UserError
from ..modelling import anatomy
from ..modelling.anatomy import blocks
from ..modelling.masters import Group
from ..modelling.models import Model
from ..modelling.norms import batch_norms
from .method import Base, Format, Method


class _OwnWeights(Method):
    format: ClassVar[Format] = "transformers"
    learns_the_model: ClassVar[bool] = True

    def put_on(self, base: Base) -> Model:
        """See Method."""
        trained = self.trained(base)
        norms = batch_norms(base.inner)
        for name, parameter in base.inner.named_parameters():
            if name not in trained:
                parameter.requires_grad_(False)
                if name.rpartition(".")[0] not in norms:
                    parameter.data = parameter.data.to(base.compute)
        reload = base.reload if len(trained) < len(list(base.inner.parameters())) else None
        return Model(base.inner, base.inner, base.stored, reload=reload)

    def _has_head(self, inner: Any) -> bool:
        """Whether the task has a head of its own."""
        return bool(anatomy.head(inner.config, self.spec.head))

    def trained(self, base: Base) -> set[str]:
        """Names of the weights to train."""
        return {name for name, _ in base.inner.named_parameters()}

    def save(self, folder: Path, model: Model, weights: dict[str, Tensor]) -> None:
        """See Method. What was not trained has the bits of the model that was loaded."""
        frozen = _saved(model.inner)
        untrained = [t for name, t in frozen.items() if name not in weights and t.is_floating_point()]
        if any(tensor.dtype != model.dtype for tensor in untrained) and model.reload:
            frozen = _saved(model.reload())
        complete = {
            name: weights.pop(name, tensor).to("cpu", model.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in frozen.items()
        }
        kept = model.inner.state_dict().keys()
        for name, buffer in model.inner.named_buffers():  # running statistics, which are read in fp32
            if name in kept:
                complete[name] = buffer.to("cpu", model.dtype if buffer.is_floating_point() else buffer.dtype)
        model.inner.save_pretrained(folder, state_dict=complete)
        model.inner.config.dtype = model.dtype  # in place of what the model computes in, which transformers has noted
        model.inner.config.save_pretrained(folder)

    def how_to_load(self, model_type: str, kind: str, base: str, names: str) -> str:
        """See Method."""
        return f'model = transformers.{kind}.from_pretrained("this folder")'


class FullMethod(_OwnWeights):
    """Every weight."""

    def groups(self, model: Model, names: Sequence[str], steps_per_epoch: int, total_steps: int) -> list[Group]:
        """A group for each block, whose rate falls by layerDecay from one block to the one below."""
        assert self.spec.method.full
        decay = float(self.spec.method.full.layer_decay)
        if decay == 1:
            return [Group(tuple(names))]
        stages = _from_the_head(model.inner, self._has_head(model.inner), 1, names)
        # The head shares the rate of the last block; what lies below the blocks comes once more after the first.
        return [Group(stage, decay ** max(0, depth - 1)) for depth, stage in enumerate(stages) if stage]


class FreezeMethod(_OwnWeights):
    """Some of the weights."""

    def trained(self, base: Base) -> set[str]:
        """See _OwnWeights."""
        freeze, inner = self.spec.method.freeze, base.inner
        assert freeze
        chosen = {name for head in base.head_modules for name in _of(inner, inner.get_submodule(head))}
        if freeze.train_last_blocks:
            stack = blocks(inner)
            if freeze.train_last_blocks > len(stack):
                raise UserError(
                    f"method.freeze.trainLastBlocks {freeze.train_last_blocks} is more than the {len(stack)} blocks of {self.spec.model.uri}; lower it"
                )
            for block in stack[len(stack) - freeze.train_last_blocks :]:
                chosen |= set(_of(inner, block))
        for pattern in freeze.train_modules or ():
            found = [module for name, module in inner.named_modules() if _matches(name, pattern)]
            if not any(True for module in found for _ in module.parameters()):
                raise UserError(
                    f"method.freeze.trainModules: {pattern!r} is the name of no module of {self.spec.model.uri} with weights; it has such as {_example(inner)}"
                )
            if not base.head_modules and anatomy.has_tied_head(inner) and inner.get_output_embeddings() in found:
                raise UserError(
                    f"method.freeze.trainModules: the head of {self.spec.model.uri} is its embedding (tie_word_embeddings): name that ({pattern!r} is the head), if training it is meant"
                )
            for module in found:
                chosen |= set(_of(inner, module))
        if freeze.train_head and not base.head_modules:
            if anatomy.has_tied_head(inner):
                raise UserError(
                    f"method.freeze.trainHead: the head of {self.spec.model.uri} is its embedding (tie_word_embeddings), so training it moves every input too; use trainLastBlocks, or name the embedding in trainModules"
                )
            chosen |= set(_of(inner, inner.get_output_embeddings()))
        if freeze.train_biases:
            biases = {name for name, _ in inner.named_parameters() if name.endswith("bias")}
            if not biases:
                raise UserError(
                    f"method.freeze.trainBiases: {self.spec.model.uri} has no biases, as most models since Llama; use another method"
                )
            chosen |= biases
        return chosen


class GradualUnfreezingMethod(_OwnWeights):
    """More and more of the weights, from the head downwards."""

    def groups(self, model: Model, names: Sequence[str], steps_per_epoch: int, total_steps: int) -> list[Group]:
        """A group for each stage; it begins when its turn comes."""
        gradual = self.spec.method.gradual_unfreezing
        assert gradual
        every = gradual.every_steps or math.ceil(float(gradual.every_epochs or 0) * steps_per_epoch)
        if every < 1:
            raise UserError("method.gradualUnfreezing.everyEpochs is not a single step: raise it")
        stages = [
            stage
            for stage in _from_the_head(model.inner, self._has_head(model.inner), gradual.blocks_per_stage, names)
            if stage
        ]
        last = every * (len(stages) - 1)
        if last >= total_steps:
            raise UserError(
                f"method.gradualUnfreezing: the last of {len(stages)} stages would begin at step {last}, and training ends after {total_steps}; unfreeze faster (everySteps, everyEpochs, blocksPerStage) or train longer"
            )
        decay = float(gradual.layer_decay)
        return [Group(stage, decay**number, every * number) for number, stage in enumerate(stages)]


def _from_the_head(inner: Any, has_head: bool, blocks_per_stage: int, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Names by stage: the head with the final norm, the blocks from the last to the first, then what lies below them.

    A head that is the embedding too counts as embedding; the final norm goes with the last blocks then, since alone it learns nothing. The
    final norm of an encoder goes with its own last block.
    """
    stack = blocks(inner)
    ends = range(len(stack), 0, -blocks_per_stage)
    stages = [
        {name for block in stack[max(0, end - blocks_per_stage) : end] for name in _of(inner, block)} for end in ends
    ]
    outside = set(names).difference(*stages)
    base = set(_of(inner, inner.base_model))
    first = set(itertools.takewhile(outside.__contains__, (name for name in names if name in base)))
    embedding = {name for part in (anatomy.embedding(inner), *anatomy.lookups(inner)) for name in _of(inner, part)}
    behind = {
        name for part in anatomy.of(inner.config.model_type).behind for name in _of(inner, inner.get_submodule(part))
    }
    above = {name for name in outside if "embed" not in name or name in behind} - embedding - first
    below = outside - above
    if inner.config.is_encoder_decoder:
        encoder, last = (set(_of(inner, part)) for part in (inner.get_encoder(), anatomy.stacks(inner)[0][-1]))
        next(stage for stage in stages if stage & last).update(above & encoder)
        above -= encoder
    if not has_head and anatomy.has_tied_head(inner):
        stages[0] |= above
        above = set()
    return [tuple(name for name in names if name in stage) for stage in (above, *stages, below)]


def _saved(inner: Any) -> dict[str, Tensor]:
    """What of a model is saved, by name: weights, tied ones once, and buffers such as BART's final_logits_bias."""
    kept = inner.state_dict().keys()
    buffers = {name: buffer for name, buffer in inner.named_buffers() if name in kept}
    return {name: tensor.detach() for name, tensor in (*inner.named_parameters(), *buffers.items())}


def _of(inner: Any, module: nn.Module) -> Iterable[str]:
    """Names that the model gives to the weights of one of its modules."""
    own = {id(parameter) for parameter in module.parameters()}
    return [name for name, parameter in inner.named_parameters() if id(parameter) in own]


def _matches(name: str, pattern: str) -> bool:
    return bool(name) and (fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}"))


def _example(inner: Any) -> str:
    linear = [name for name, module in inner.named_modules() if isinstance(module, nn.Linear)]
    return ", ".join(linear[:3])
