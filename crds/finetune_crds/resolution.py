"""FineTuneJob -> ResolvedJob: every default that an expert would choose, filled in once.

The operator resolves when an attempt is recorded, pins the result in status.resolved and mounts it as JOB_FILE; `finetune local`
resolves the same way.
"""

import hashlib
import json
from collections.abc import Mapping
from decimal import Decimal as Exact
from typing import Any, Final, NamedTuple

from . import locations, support
from .resolved import (
    ResolvedFineTune,
    ResolvedJob,
    ResolvedModel,
    ResolvedProgram,
    ResolvedSpec,
)
from .support import Task
from .v1alpha1 import (
    OUTCOME_FIELDS,
    ApiModel,
    FineTuneJob,
    FineTuneJobSpec,
    Location,
    Model,
    Reference,
)
from .v1alpha1.evaluation import Evaluation
from .v1alpha1.objective import RewardModel
from .v1alpha1.pods import Resources
from .v1alpha1.results import Checkpoints
from .v1alpha1.training import Training


class Published(NamedTuple):
    """The output of a FineTuneJob that is Complete."""

    uri: str
    digest: str
    endpoint: str | None = None
    region: str | None = None
    base: ResolvedModel | None = None
    """Of an adapter: the model that it was trained on."""


class Defaults(ApiModel):
    """Defaults that a platform team sets for the whole cluster (chart values)."""

    trainer_image: str
    """Image of `finetune_trainer`."""
    gpu_resource_name: str = "nvidia.com/gpu"
    """Extended resource that stands for a GPU."""


def resolve(job: FineTuneJob, defaults: Defaults, published: Mapping[str, Published] | None = None) -> ResolvedJob:
    """Fills in every default of a valid job.

    Args:
        job: the job.
        defaults: the cluster's.
        published: outputs of the jobs that this one continues, by name; one that is not among them gets the URI job://NAME.

    Raises:
        pydantic.ValidationError: the job breaks a rule of the schema; the API server, or `validation.check`, says so first.
    """
    spec = job.spec
    is_program = bool(spec.runtime and spec.runtime.command)
    wire = spec.to_wire()
    wire["resources"] = _resources(spec.resources or Resources(), defaults)
    wire["checkpoints"] = _checkpoints(spec.checkpoints or Checkpoints(), spec.output)
    wire["runtime"] = {"image": defaults.trainer_image, "runAsUser": 10001, **wire.get("runtime", {})}
    wire.setdefault("retries", 3)
    wire.setdefault("preflight", "Required" if wire["resources"]["gpusPerNode"] and not is_program else "Skip")
    if spec.model:
        wire["model"] = _model(spec.model, published or {})
    resolved: ResolvedFineTune | ResolvedProgram
    if is_program:
        resolved = ResolvedProgram.model_validate(wire)
    else:
        method = spec.method.name if spec.method else "lora"
        projection = bool(spec.method and spec.method.prefix and spec.method.prefix.projection)
        on_gpu = wire["resources"]["gpusPerNode"] > 0
        task = spec.task or "text-generation"
        wire["task"] = task
        wire["objective"] = _objective(task, wire.get("objective") or {})
        if spec.objective and spec.objective.grpo:
            for given, reward in zip(spec.objective.grpo.rewards, wire["objective"]["grpo"]["rewards"], strict=True):
                if given.model:
                    reward["model"] = _reward_model(given.model, published or {})
        if task not in ("question-answering", "image-classification"):
            pretrains = "pretrain" in (wire["objective"] or {})
            wire["dataset"] = {"tooLong": "split" if pretrains else "truncate", **wire["dataset"]}
        wire["method"] = _method(spec)
        _augmentation(wire["dataset"].get("augmentation") or {})
        wire["training"] = _training(
            spec.training or Training(),
            method=method,
            objective=next(iter(wire["objective"] or {}), None),
            projection=projection,
            on_gpu=on_gpu,
            packs=task == "text-generation",
        )
        objective = next(iter(wire["objective"] or {}), None)
        wire["evaluation"] = _evaluation(spec.evaluation or Evaluation(), task, objective)
        if objective == "grpo":
            wire["evaluation"] = {**wire["evaluation"], "metric": "eval_reward"}
            _between_generations(wire)
        resolved = ResolvedFineTune.model_validate(wire)
    return ResolvedJob(
        name=str(job.metadata.get("name", "local")),
        namespace=str(job.metadata.get("namespace", "default")),
        uid=str(job.metadata.get("uid", "local")),
        digest=outcome_digest(resolved, own_image=bool(spec.runtime and spec.runtime.image)),
        spec=resolved,
    )


def _model(model: Model, published: Mapping[str, Published]) -> dict[str, Any]:
    wire = model.to_wire() | _place(model, published)
    if model.adapter:
        wire["adapter"] = model.adapter.to_wire() | _place(model.adapter, published)
    if model.add_tokens:
        wire["addTokens"] = {"special": False, **model.add_tokens.to_wire()}
    return wire


def _reward_model(model: RewardModel, published: Mapping[str, Published]) -> dict[str, Any]:
    """A job's adapter is put on the base that it was trained on."""
    wire = model.to_wire() | _place(model, published)
    if model.adapter:
        wire["adapter"] = model.adapter.to_wire() | _place(model.adapter, published)
    there = published.get(model.job or "")
    if model.adapter or there is None or there.base is None:
        return wire
    secret = model.secret_ref if _server(there.base) == _server(there) else None
    base = there.base.model_copy(update={"adapter": None, "add_tokens": None, "secret_ref": secret})
    return {**base.to_wire(), "adapter": wire}


def _server(place: Location | Published) -> tuple[str | None, ...]:
    """Who is shown the credentials: those for one place are not for another's eyes."""
    parsed = locations.parse(place.uri)
    return parsed.scheme, parsed.root if parsed.scheme in ("oci", "https") else None, place.endpoint


def _place(reference: Reference, published: Mapping[str, Published]) -> dict[str, Any]:
    """What a job's output adds to a reference to it. An image is asked for by its digest: its tag may have moved on."""
    if reference.job is None:
        return {}
    there = published.get(reference.job)
    if there is None:
        return {"uri": f"job://{reference.job}"}
    uri = f"{there.uri}@{there.digest}" if there.uri.startswith("oci://") else there.uri
    known = {"endpoint": there.endpoint, "region": there.region}
    return {"uri": uri, "digest": there.digest, **{name: value for name, value in known.items() if value}}


def outcome_digest(spec: ResolvedSpec, *, own_image: bool) -> str:
    """sha256 over canonical JSON of what decides the outcome: `sha256:<hex>`.

    Of the output only whether it is merged counts, and gates only decide whether there will be one. What only moves memory does not count: a job
    that ran out of it resumes with paged moments, or gradient checkpointing. A learning rate that nobody gave is a function of the model where it is not in the spec. An upgrade of the operator's own trainer image does not change it, so that a job
    resumes and an output is recognised across it.
    """
    wire = spec.to_wire()
    if isinstance(spec, ResolvedFineTune):
        del wire["training"]["optimizer"]["adamw"]["paged"]
        del wire["training"]["gradientCheckpointing"]
    kept: dict[str, Any] = {}
    for path in OUTCOME_FIELDS:
        if path == "output" or (path == "runtime.image" and not own_image):
            continue
        value: Any = wire
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            kept[path] = value
    kept.get("evaluation", {}).pop("gates", None)
    if spec.output and spec.output.merged:
        kept["output.merged"] = True
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _resources(given: Resources, defaults: Defaults) -> dict[str, Any]:
    gpus = 1 if given.gpus_per_node is None else given.gpus_per_node
    return {
        "nodes": 1,
        "gpusPerNode": gpus,
        "gpuResourceName": defaults.gpu_resource_name,
        "cpu": 4 * gpus or 2,
        "memory": f"{32 * gpus or 8}Gi",
        "scratch": "50Gi",
        "sharedMemory": f"{8 * gpus or 1}Gi",
        **given.to_wire(),
    }


def _checkpoints(given: Checkpoints, output: Location | None) -> dict[str, Any]:
    wire: dict[str, Any] = {"keep": 2, "gracePeriodSeconds": 600, **given.to_wire()}
    if given.every_steps is None:
        wire.setdefault("everyMinutes", 10)
    if output and not given.storage and (beside := locations.checkpoint_storage(output)):
        wire["storage"] = beside.to_wire()
    return wire


def _objective(task: Task, given: dict[str, Any]) -> dict[str, Any] | None:
    possible = [name for name, tasks in support.OBJECTIVES.items() if task in tasks]
    if not possible:
        return None
    (name,) = given or possible[:1]
    chosen: dict[str, Any] = {}
    match name:
        case "classification":
            chosen = {"problem": "singleLabel", "balanceClasses": False}
        case "dpo":
            chosen = {"loss": "sigmoid", "beta": "0.1", "labelSmoothing": "0"}
        case "orpo":
            chosen = {"beta": "0.1"}
        case "kto":
            chosen = {"beta": "0.1", "desirableWeight": "1", "undesirableWeight": "1"}
        case "reward":
            chosen = {"centering": "0"}
        case "grpo":
            chosen = _grpo(given["grpo"])
            given = {}
    return {name: {**chosen, **given.get(name, {})}}


def _grpo(given: dict[str, Any]) -> dict[str, Any]:
    epsilon = given.get("epsilon", "0.2")
    return {
        "generations": 8,
        "temperature": "1",
        "loss": "dapo",
        "scaleRewards": "none" if given.get("loss") == "dr_grpo" else "group",
        "beta": "0",
        "epsilon": epsilon,
        "epsilonHigh": epsilon,
        "iterations": 1,
        "generationBatchSize": 64,
        **given,
        "rewards": [{"weight": "1", **reward} for reward in given["rewards"]],
    }


def _between_generations(wire: dict[str, Any]) -> None:
    """Evaluations and checkpoints come where new answers are generated: a run resumes there without the old ones."""
    iterations = wire["objective"]["grpo"]["iterations"]
    for part in ("checkpoints", "evaluation"):
        if every := wire[part].get("everySteps"):
            wire[part]["everySteps"] = -(-every // iterations) * iterations


def _augmentation(wire: dict[str, Any]) -> None:
    """Completes what is asked for."""
    if "randomResizedCrop" in wire:
        wire["randomResizedCrop"].setdefault("minScale", "0.08")
    if "randAugment" in wire:
        wire["randAugment"] = {"operations": 2, "magnitude": 9, **wire["randAugment"]}
    if "synonyms" in wire:
        wire["synonyms"].setdefault("probability", "0.1")


_LEARNING_RATES: Final = {
    "full": "2e-5",
    "freeze": "5e-5",
    "gradualUnfreezing": "2e-5",
    "lora": "2e-4",
    "qlora": "2e-4",
    "adapter": "1e-4",
    "prefix": "1e-2",
    "prompt": "3e-2",
    "pTuning": "1e-3",
    "ia3": "3e-3",
}
"""Peak learning rate by method. Sources: docs/methods.md."""
LARGE: Final = 13_500_000_000
"""Weights of the largest model that goes by 13B."""
_LARGE_RATES: Final = {"lora": "1e-4", "qlora": "1e-4"}
"""That of larger models, where it depends on the size."""
_PARTS: Final = {"dpo": "0.05", "kto": "0.05", "grpo": "0.05", "orpo": "0.4", "reward": "0.5"}
"""Of it what an objective takes, where not all. Sources: docs/objectives.md."""
_ONCE: Final = ("pretrain", *support.UNPACKED)
"""Objectives that pass over their rows once."""
_OWN_WEIGHTS: Final = ("full", "freeze", "gradualUnfreezing")
"""Methods that train the model's own weights."""


def _method(spec: FineTuneJobSpec) -> dict[str, Any]:
    name = spec.method.name if spec.method else "lora"
    given: dict[str, Any] = spec.method.to_wire()[name] if spec.method else {}
    chosen: dict[str, Any] = {}
    match name:
        case "full":
            chosen = {"layerDecay": "1"}
        case "gradualUnfreezing":
            chosen = {"blocksPerStage": 1, "layerDecay": "0.9"}
        case "lora" | "qlora":
            chosen = {"dropout": "0", "loraPlusRatio": "1"}
            if not (spec.model and spec.model.adapter):
                rank = given.get("rank", 16)
                chosen |= {
                    "rank": rank,
                    "alpha": 2 * rank,
                    "targets": ["all-linear"],
                    "useDora": False,
                    "useRslora": False,
                }
                chosen |= {"initialization": "zero", "experts": False} if name == "lora" else {}
            if name == "qlora":
                bits = given.get("bits", 4)
                chosen |= {"bits": bits, "doubleQuantization": True if bits == 4 else None}
        case "adapter":
            chosen = {"placement": "pfeiffer", "reductionFactor": 16, "nonLinearity": "relu"}
        case "prefix":
            chosen = {"length": 20, "projection": False}
        case "prompt":
            chosen = {"length": 20}
        case "pTuning":
            chosen = {"length": 20, "encoder": "mlp"}
    return {name: {**chosen, **given}}


def learning_rate(
    method: str, objective: str | None, weights: int | None = None, *, projection: bool = False
) -> str | None:
    """The default peak learning rate.

    Args:
        method: name of the method.
        objective: name of the objective, if there is one.
        weights: how many the model has; None: not known, as it is to the operator.
        projection: that of method.prefix.

    Returns:
        None where it depends on the model's size, and that is not known.
    """
    if method in _LARGE_RATES and weights is None:
        return None
    by_method = _LARGE_RATES if weights and weights > LARGE and method in _LARGE_RATES else _LEARNING_RATES
    rate = "5e-5" if projection else by_method[method]
    if objective in _PARTS:
        rate = f"{(Exact(rate) * Exact(_PARTS[objective])).normalize():e}"
    return rate


def _training(
    given: Training, *, method: str, objective: str | None, projection: bool, on_gpu: bool, packs: bool
) -> dict[str, Any]:
    packs = packs and objective not in support.UNPACKED
    wire: dict[str, Any] = {
        "learningRate": learning_rate(method, objective, projection=projection),
        "schedule": "cosine",
        "packing": None if packs else False,
        "gradientCheckpointing": False,
        "precision": "bf16" if on_gpu else "fp32",
        "seed": 42,
        "weightDecay": "0.01" if method in _OWN_WEIGHTS else "0",
        "labelSmoothing": "0",
        "neftuneNoise": "0",
        "l2Sp": "0",
        "maxGradNorm": "1",
        **given.to_wire(),
    }
    numbers = {"beta1": "0.9", "beta2": "0.999", "epsilon": "1e-8", "bits": 32, "paged": False}
    given_numbers = given.optimizer.adamw.to_wire() if given.optimizer and given.optimizer.adamw else {}
    wire["optimizer"] = {"adamw": {**numbers, **given_numbers}}
    if given.max_steps is None:
        wire.setdefault("epochs", "1" if objective in _ONCE else "3")
    if given.tokens_per_step is None:
        wire.setdefault("batchSize", 16)
    if given.warmup_steps is None:
        wire.setdefault("warmupRatio", "0.03")
    return wire


def _evaluation(given: Evaluation, task: Task, objective: str | None) -> dict[str, Any]:
    wire: dict[str, Any] = {
        "metric": "eval_loss",
        "publish": "best" if given.every_steps else "last",
        "prompts": [],
        "maxNewTokens": 128 if task in support.PAIRS else 64,
        "slices": [],
        "benchmarks": [],
        "gates": [],
        **given.to_wire(),
    }
    if task in support.PAIRS:
        wire.setdefault("generate", "everyEvaluation" if wire["metric"] in support.WRITTEN else "beforeAndAfter")
    if objective == "sft" or task in support.PAIRS:
        rows = 64 if objective == "sft" else 0
        wire["fewShot"] = {"examples": 4, "rows": rows, **wire.get("fewShot", {})}
    return wire
