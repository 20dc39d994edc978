"""What is minimised and measured: a class for each objective, or task with a loss of its own; `chosen` is the table. Called by setup."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from finetune_crds.resolved import ResolvedFineTune

from ..data.prepared import RowSet
from ..methods.method import Method
from .classes import Classes, Numbers, SeveralClasses
from .grpo import Grpo
from .images import ImageClasses
from .kto import Kto
from .language import Sft
from .objective import Objective
from .pairs import PairLoss
from .preference import Dpo, Orpo
from .reference import Reference
from .reward import Reward
from .reward_model import JudgeFolders, reward_models
from .rewards import panel
from .spans import SpanAnswers
from .tags import Tagging

__all__ = ["JudgeFolders", "Objective", "chosen"]


def chosen(
    spec: ResolvedFineTune,
    config: Any,
    rows: RowSet,
    tokenizer: Any,
    image_processor: Any,
    method: Method,
    judges: Mapping[str, JudgeFolders],
    device: torch.device,
    stopping: Callable[[], bool],
) -> Objective:
    """The objective of a job.

    Args:
        spec: the resolved job.
        config: of the model.
        rows: the prepared set.
        tokenizer: of the model.
        image_processor: of a model of images.
        method: which weights are trained.
        judges: where the reward models of objective.grpo lie on this machine, by the name of the reward.
        device: where they are to compute.
        stopping: whether this rank was asked to stop, for what takes long.
    """
    match spec.task:
        case "text-generation":
            assert spec.objective
            objective = spec.objective
            if objective.dpo:
                return Dpo(objective.dpo, Reference(method))
            if objective.orpo:
                return Orpo(objective.orpo)
            if objective.kto:
                return Kto(objective.kto, Reference(method))
            if objective.reward:
                return Reward(objective.reward, config)
            if objective.grpo:
                models = reward_models(spec, judges, device)
                return Grpo(spec, method, tokenizer, panel(objective.grpo.rewards, models), stopping)
            return Sft(float(spec.training.label_smoothing))
        case "token-classification":
            return Tagging(spec, config, rows)
        case "question-answering":
            return SpanAnswers(spec, config)
        case "summarization" | "translation":
            return PairLoss(spec, tokenizer)
        case "image-classification":
            return ImageClasses(spec, config, rows, image_processor)
        case "text-classification":
            match spec.problem:
                case "singleLabel":
                    return Classes(spec, config, rows, tokenizer)
                case "multiLabel":
                    return SeveralClasses(spec, config, rows, tokenizer)
                case "regression":
                    return Numbers(spec, config, rows, tokenizer)
