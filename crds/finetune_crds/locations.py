"""URIs of Locations, taken apart. The operator mounts by them, the trainer opens by them."""

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from .v1alpha1 import FineTuneJobSpec, Location

Scheme = Literal["pvc", "s3", "https", "hf", "configmap", "file"]


class Place(NamedTuple):
    """A URI's parts."""

    scheme: Scheme
    root: str
    """Claim, bucket, host, ConfigMap or org/name of the hub; empty for file."""
    path: str
    """Path below the root without a leading slash (file: with it); empty for the root itself."""
    revision: str | None = None
    """hf only: branch, tag or commit."""


def parse(uri: str) -> Place:
    """Takes a URI apart.

    Raises:
        ValueError: not one of the schemes, or nothing after it.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme not in get_args(Scheme) or not rest:
        raise ValueError(f"{uri!r} is no location: use one of {', '.join(s + '://' for s in get_args(Scheme))}")
    if scheme == "file":
        return Place("file", "", rest)
    if scheme == "hf":
        name, _, revision = rest.partition("@")
        parts = name.split("/", 2)
        if len(parts) < 2 or not parts[1]:
            raise ValueError(f"{uri!r} needs an organisation and a name: hf://org/name@revision")
        return Place("hf", "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", revision or None)
    root, _, path = rest.partition("/")
    return Place(scheme, root, path.strip("/"))  # type: ignore[arg-type]


def inputs(spec: FineTuneJobSpec) -> Iterator[tuple[str, Location]]:
    """Every location that is read, with its path in the spec."""
    if spec.model:
        yield "model", spec.model
        if spec.model.adapter:
            yield "model.adapter", spec.model.adapter
    if spec.dataset:
        for i, source in enumerate(spec.dataset.train):
            yield f"dataset.train[{i}]", source
        held_out = spec.dataset.evaluation
        for i, source in enumerate((held_out and held_out.sources) or ()):
            yield f"dataset.evaluation.sources[{i}]", source
        for i, one in enumerate((held_out and held_out.sets) or ()):
            for j, source in enumerate(one.sources):
                yield f"dataset.evaluation.sets[{i}].sources[{j}]", source
        for i, source in enumerate((held_out and held_out.general) or ()):
            yield f"dataset.evaluation.general[{i}]", source


def outputs(spec: FineTuneJobSpec) -> Iterator[tuple[str, Location]]:
    """Every location that is written, with its path in the spec."""
    if spec.output:
        yield "output", spec.output
    if spec.checkpoints and spec.checkpoints.storage:
        yield "checkpoints.storage", spec.checkpoints.storage


def checkpoint_storage(output: Location) -> Location:
    """Where checkpoints lie when nobody says: beside the output, with its credentials."""
    return Location(
        uri=output.uri.rstrip("/") + ".checkpoints",
        secret_ref=output.secret_ref,
        endpoint=output.endpoint,
        region=output.region,
    )
