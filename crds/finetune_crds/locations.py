"""URIs of Locations, taken apart. The operator mounts by them, the trainer opens by them."""

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from .v1alpha1 import FineTuneJobSpec, Location

Scheme = Literal["pvc", "s3", "https", "hf", "configmap", "file", "oci", "job"]


class Place(NamedTuple):
    """A URI's parts."""

    scheme: Scheme
    root: str
    """Claim, bucket, host, registry, FineTuneJob, ConfigMap or org/name of the hub; empty for file."""
    path: str
    """Path below the root without a leading slash (file: with it); empty for the root itself. oci: the repository."""
    revision: str | None = None
    """hf: branch, tag or commit. oci: tag or digest."""


def parse(uri: str) -> Place:
    """Takes a URI apart. job:// stands for an output that is not known yet; users write `job: NAME`.

    Raises:
        ValueError: not one of the schemes, or nothing after it.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme not in get_args(Scheme) or not rest:
        known = ", ".join(f"{each}://" for each in get_args(Scheme) if each != "job")
        raise ValueError(f"{uri!r} is no location: use one of {known}")
    if scheme == "file":
        return Place("file", "", rest)
    if scheme == "hf":
        name, _, revision = rest.partition("@")
        parts = name.split("/", 2)
        if len(parts) < 2 or not parts[1]:
            raise ValueError(f"{uri!r} needs an organisation and a name: hf://org/name@revision")
        return Place("hf", "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", revision or None)
    root, _, path = public(uri).removeprefix(f"{scheme}://").partition("/")
    if scheme == "oci":
        name, _, digest = path.partition("@")
        repository, _, tag = name.partition(":")
        if not repository:
            raise ValueError(f"{uri!r} needs a registry and a repository: oci://registry/repository:tag")
        return Place("oci", root, repository, digest or tag or None)
    return Place(scheme, root, path.strip("/"))  # type: ignore[arg-type]


def public(uri: str) -> str:
    """A URI as others may read it: the query of an https address may be a signature that opens the file."""
    return uri.partition("?")[0] if uri.startswith("https://") else uri


def inputs(spec: FineTuneJobSpec) -> Iterator[tuple[str, Location]]:
    """Every location that is read, with its path in the spec."""
    if spec.model:
        if place := spec.model.location():
            yield "model", place
        if spec.model.adapter and (place := spec.model.adapter.location()):
            yield "model.adapter", place
        if spec.model.add_tokens and spec.model.add_tokens.file:
            yield "model.addTokens.file", spec.model.add_tokens.file
    if spec.dataset:
        for i, trained in enumerate(spec.dataset.train):
            yield f"dataset.train[{i}]", trained
        if spec.dataset.augmentation and spec.dataset.augmentation.synonyms:
            yield "dataset.augmentation.synonyms", spec.dataset.augmentation.synonyms
        held_out = spec.dataset.evaluation
        for i, source in enumerate((held_out and held_out.sources) or ()):
            yield f"dataset.evaluation.sources[{i}]", source
        for i, one in enumerate((held_out and held_out.sets) or ()):
            for j, source in enumerate(one.sources):
                yield f"dataset.evaluation.sets[{i}].sources[{j}]", source
        for i, source in enumerate((held_out and held_out.general) or ()):
            yield f"dataset.evaluation.general[{i}]", source
    if spec.objective and spec.objective.grpo:
        for i, reward in enumerate(spec.objective.grpo.rewards):
            if reward.model and (place := reward.model.location()):
                yield f"objective.grpo.rewards[{i}].model", place
            if reward.model and reward.model.adapter and (place := reward.model.adapter.location()):
                yield f"objective.grpo.rewards[{i}].model.adapter", place
    for i, benchmark in enumerate((spec.evaluation and spec.evaluation.benchmarks) or ()):
        yield f"evaluation.benchmarks[{i}]", benchmark


def outputs(spec: FineTuneJobSpec) -> Iterator[tuple[str, Location]]:
    """Every location that is written, with its path in the spec."""
    if spec.output:
        yield "output", spec.output
    if spec.checkpoints and spec.checkpoints.storage:
        yield "checkpoints.storage", spec.checkpoints.storage


def checkpoint_storage(output: Location) -> Location | None:
    """Where checkpoints lie when nobody says: beside the output, with its credentials. None where they cannot (oci)."""
    if parse(output.uri).scheme not in ("pvc", "s3", "file"):
        return None
    return Location(
        uri=output.uri.rstrip("/") + ".checkpoints",
        secret_ref=output.secret_ref,
        endpoint=output.endpoint,
        region=output.region,
    )
