"""Locations that are read: a URI becomes a file or folder on this machine. Called by loading, and by trees.

Claims, ConfigMaps and local files are used where they are; s3://, https://, hf:// and oci:// are downloaded, resumed where an earlier try
stopped, and verified. A place that is wrong is a UserError that names the URI and says what to do; trouble on the way is tried again
with back-off and ends as StorageError.
"""

from pathlib import Path
from typing import Final

from finetune_crds import locations
from finetune_crds.v1alpha1 import Location

from ..errors import UserError
from . import downloads, images
from .roots import Roots

_LISTED: Final = 8


def materialise(location: Location, into: Path, roots: Roots | None = None) -> Path:
    """The file or folder behind a location, for reading only.

    Args:
        location: any scheme; hf:// is a model repository here.
        into: folder that downloads go to, one for each location; hf:// has a cache of its own.
        roots: where claims, ConfigMaps and Secrets lie; default: what this process was started with.

    Raises:
        UserError: the place is wrong.
        StorageError: it could not be reached.
    """
    roots = roots or Roots.from_environment()
    place = locations.parse(location.uri)
    if place.scheme in ("pvc", "file", "configmap"):
        path = local_path(location, roots)
        if not path.exists():
            raise UserError(missing(location, path))
        return path
    into.mkdir(parents=True, exist_ok=True)
    if place.scheme == "s3":
        return downloads.from_s3(location, into, roots)
    if place.scheme == "https":
        return downloads.from_https(location, into, roots)
    if place.scheme == "oci":
        return images.fetch(location, into, roots)
    return downloads.from_hub(location, roots, repository="model")


def local_path(location: Location, roots: Roots) -> Path:
    """Where a pvc://, configmap:// or file:// location lies, whether or not it is there.

    Raises:
        UserError: the claim or ConfigMap is not mounted.
    """
    place = locations.parse(location.uri)
    if place.scheme == "file":
        return Path(place.path)
    root = (roots.configmaps if place.scheme == "configmap" else roots.volumes) / place.root
    if not root.is_dir():
        kind = "ConfigMap" if place.scheme == "configmap" else "PersistentVolumeClaim"
        hint = "add it to the manifest's file" if place.scheme == "configmap" else f"--claim {place.root}=DIR"
        raise UserError(
            f"{location.uri}: {kind} {place.root} is not mounted; create it in the job's namespace (finetune local: {hint})"
        )
    return root / place.path


def missing(location: Location, path: Path) -> str:
    """Says what is there instead, from the nearest folder that exists."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(child.name for child in folder.iterdir() if not child.name.startswith("."))
    listed = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    noun = "key" if locations.parse(location.uri).scheme == "configmap" else "file or folder"
    return f"{location.uri}: there is no such {noun}; {folder.name or folder} holds {listed or 'nothing'}"
