"""Credentials of a Location, read from the files of its mounted Secret at each use, because they are rotated."""

from finetune_crds import locations
from finetune_crds.v1alpha1 import Location

from ..errors import UserError
from .roots import Roots


def read(location: Location, key: str, roots: Roots) -> str | None:
    """The value of one key, or None when the Location names no Secret or the Secret has no such key.

    Raises:
        UserError: the Secret is not mounted.
    """
    if location.secret_ref is None:
        return None
    folder = roots.secrets / location.secret_ref.name
    if not folder.is_dir():
        raise UserError(
            f"secretRef of {locations.public(location.uri)}: Secret {location.secret_ref.name} is not mounted; "
            f"create it in the job's namespace (finetune local: --secret {location.secret_ref.name}=DIR)"
        )
    file = folder / key
    return file.read_text(encoding="utf-8").strip() or None if file.is_file() else None


def require(location: Location, key: str, roots: Roots) -> str:
    """The value of one key that must be there.

    Raises:
        UserError: the Secret is not mounted or lacks the key.
    """
    value = read(location, key, roots)
    if value is None:
        assert location.secret_ref is not None
        raise UserError(
            f"secretRef of {locations.public(location.uri)}: Secret {location.secret_ref.name} has no key {key}; add it"
        )
    return value
