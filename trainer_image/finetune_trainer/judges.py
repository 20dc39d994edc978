"""Reward models of objective.grpo, brought onto this machine and checked for being what other jobs published. Called by setup."""

import json
from pathlib import Path
from typing import NamedTuple

from finetune_crds import locations
from finetune_crds.resolved import ResolvedFineTune, ResolvedRewardModel
from finetune_crds.v1alpha1 import Location
from finetune_crds.v1alpha1.status import RewardInput

from .errors import UserError
from .objectives import JudgeFolders
from .results import outputs
from .storage.places import materialise


class Judges(NamedTuple):
    """By the name of the reward where they lie; and those that other jobs made."""

    folders: dict[str, JudgeFolders]
    inputs: list[RewardInput]


def fetch(spec: ResolvedFineTune, into: Path) -> Judges:
    """Brings them.

    Raises:
        UserError: a place is wrong, or holds something else than a job published.
        StorageError: it could not be reached.
    """
    found = Judges({}, [])
    rewards = spec.objective.grpo.rewards if spec.objective and spec.objective.grpo else []
    for i, reward in enumerate(rewards):
        if reward.model:
            field = f"objective.grpo.rewards[{i}].model"
            found.folders[reward.name], made_by = _fetched(reward.name, reward.model, field, into)
            found.inputs.extend([made_by] if made_by.model or made_by.adapter else [])
    return found


def _fetched(name: str, given: ResolvedRewardModel, field: str, into: Path) -> tuple[JudgeFolders, RewardInput]:
    model = materialise(given, into / name)
    made_by = RewardInput(name=name, model=outputs.verify(model, f"{field}.job", given))
    if given.adapter:
        adapter = materialise(given.adapter, into / f"{name}-adapter")
        made_by.adapter = outputs.verify(adapter, f"{field}.adapter.job", given.adapter)
        return JudgeFolders(model, adapter), made_by
    if (model / "adapter_config.json").is_file() and not (model / "config.json").is_file():
        return JudgeFolders(_base(model, given, field, into / f"{name}-base"), model), made_by
    return JudgeFolders(model, None), made_by


def _base(adapter: Path, given: ResolvedRewardModel, field: str, into: Path) -> Path:
    """The model that an adapter was trained on, as it says itself."""
    uri = _base_uri(adapter)
    try:
        return materialise(_beside(given, uri), into)
    except (UserError, ValueError) as error:
        raise UserError(
            f"{field}: {given.uri} is an adapter on {uri}, which cannot be read here ({error}); "
            "name the model by model.uri and the adapter by model.adapter.uri"
        ) from error


def _base_uri(adapter: Path) -> str:
    record = adapter / outputs.RECORD
    if record.is_file():
        return outputs.Record.model_validate_json(record.read_bytes()).base
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    name, revision = str(config.get("base_model_name_or_path")), config.get("revision")
    if Path(name).is_absolute():
        return f"file://{name}"  # locations are not percent-encoded
    return name if "://" in name else f"hf://{name}" + (f"@{revision}" if revision else "")


def _beside(given: Location, uri: str) -> Location:
    """A place on the same server is reached in the same way, with the same credentials; another one with none."""
    place, known = locations.parse(uri), locations.parse(given.uri)
    if place.scheme != known.scheme or (place.scheme in ("oci", "https") and place.root != known.root):
        return Location(uri=uri)
    return Location(uri=uri, secret_ref=given.secret_ref, endpoint=given.endpoint, region=given.region)
