"""Where checkpoints and the result go."""

from typing import Annotated, ClassVar

from pydantic import Field

from .common import (
    ApiModel,
    Rule,
    at_most_one,
)
from .model import Location

_ROOT = "((pvc|s3)://[^/]+|file://)"
_PART = "(/[^/]*[^/.][^/]*)"
"""Regular expressions of where results can lie, and of a folder or file in there."""
_PLAIN = "without // and /./"


class Checkpoints(ApiModel):
    """When the state of training is saved, and where."""

    rules: ClassVar[tuple[Rule, ...]] = (
        at_most_one("everySteps", "everyMinutes", sentence="checkpoints takes everySteps or everyMinutes, not both"),
        Rule(
            f"!has(self.storage) || self.storage.uri.matches('^{_ROOT}{_PART}*/?$')",
            f"checkpoints.storage must be pvc://claim/path or s3://bucket/prefix, {_PLAIN}",
        ),
    )

    every_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Save each time this many steps are done."""
    every_minutes: Annotated[int, Field(ge=1, le=10_080)] | None = None
    """Save each time this many minutes have passed. Default 10."""
    keep: Annotated[int, Field(ge=1, le=100)] | None = None
    """Checkpoints to keep besides the best one. Default 2."""
    storage: Location | None = None
    """Where. Default: beside the output; required when that is oci:// or hf://."""
    grace_period_seconds: Annotated[int, Field(ge=30, le=86_400)] | None = None
    """Time that a stopped pod gets to save. Default 600."""


class Output(Location):
    """Where the result goes: an adapter in PEFT format, or a transformers folder. With oci:// it is an image that holds these files and that a kubelet mounts as an image volume, with hf:// a model repository (private when it is made)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Location.rules,
        Rule(
            f"self.uri.matches('^{_ROOT}{_PART}+/?$|^oci://[^/]+/[^:@]+:[^:@]+$|^hf://[^/@]+/[^/@]+(@[^/@]+)?$')",
            f"output.uri must be pvc://claim/path or s3://bucket/prefix, with a path of its own {_PLAIN}, oci://registry/repository:tag or hf://org/name@branch",
        ),
    )

    merged: bool | None = None
    """Publish the whole model with the adapter merged into it, and the adapter alone in its folder adapter. For method lora, qlora (into the dequantised weights) and ia3. Default false."""
