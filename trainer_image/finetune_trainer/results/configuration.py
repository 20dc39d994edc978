"""What of a job decides its result and may be read by whoever reads the result: for finetune.json and the card. Called by publish."""

from typing import Any, Final

from finetune_crds import locations, support
from finetune_crds.resolved import ResolvedFineTune

_SECTIONS: Final = ("task", "model", "dataset", "objective", "method", "training", "evaluation", "runtime")
_EVALUATION: Final = ("metric", "publish", "everySteps", "earlyStopping", "maxNewTokens")
"""Of evaluation, what decides which weights are published."""
_OFF: Final = ("labelSmoothing", "neftuneNoise", "l2Sp")
"""What is not done at 0, and may be named only where it can be done."""
_PRIVATE: Final = ("secretRef", "initialText", "job", "digest")
"""Credentials, what the user wrote to a model, and what only this cluster knows: a job's output is named by its uri."""
_NAMED_BY_USERS: Final = ("classWeights", "rankPattern", "alphaPattern")
"""Their keys are classes and modules."""


def configuration(spec: ResolvedFineTune) -> dict[str, Any]:
    """The spec of a FineTuneJob that trains the same, but for its output and what _PRIVATE leaves out. No name of a Secret, no prompt and no query of an address.

    Args:
        spec: the job's, with what the trainer decides.
    """
    wire = spec.to_wire()
    wire["evaluation"] = {name: value for name, value in wire["evaluation"].items() if name in _EVALUATION}
    if spec.task not in support.PAIRS:
        del wire["evaluation"]["maxNewTokens"]  # of answers to prompts, which stay here
    training = wire["training"]
    del training["optimizer"]["adamw"]["paged"], training["gradientCheckpointing"]  # what moves memory changes no bit
    for name in _OFF:
        if not float(training[name]):
            del training[name]
    objective = wire.get("objective", {})
    if "dpo" in objective and not float(objective["dpo"].get("labelSmoothing", 0)):
        objective["dpo"].pop("labelSmoothing", None)
    if "classification" in objective and not objective["classification"].get("balanceClasses"):
        objective["classification"].pop("balanceClasses", None)
    if spec.task == "image-classification":
        training.pop("packing", None)
    if spec.objective and spec.objective.grpo and any(reward.entry_point for reward in spec.objective.grpo.rewards):
        wire["runtime"] = {"image": wire["runtime"]["image"]}  # which has the function
    else:
        del wire["runtime"]
    found: dict[str, Any] = _public({name: wire[name] for name in _SECTIONS if name in wire})
    return found


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: locations.public(one) if name == "uri" else one if name in _NAMED_BY_USERS else _public(one)
            for name, one in value.items()
            if name not in _PRIVATE
        }
    return [_public(one) for one in value] if isinstance(value, list) else value
