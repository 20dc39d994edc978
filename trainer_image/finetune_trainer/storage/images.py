"""A folder as an OCI image: published under a tag whole or not at all, and read back. Called by stores and places.

It is an image and no artifact of its own media types, because that is what everything opens: a kubelet mounts it as an image volume,
KServe and vLLM read it from there, `FROM` and `COPY --from` take it, containerd, podman and skopeo pull it. Each layer says to `oras pull`
that it is to be unpacked. A tag names an index with the same layers for amd64 and arm64, since a runtime unpacks only what is for its machine.

The same files make the same digest: tar and gzip headers hold no time, no owner and no name, and nothing is compressed (weights do not
compress). Small files share the first layer, every large one has its own, so that pulls run side by side.
"""

import gzip
import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

from finetune_crds import locations
from finetune_crds.v1alpha1 import Location

from ..errors import UserError
from .registry import Manifest, Registry
from .roots import Roots

LARGE: Final = 64 * 1024 * 1024
"""Bytes from which a file has a layer of its own."""
LABEL: Final = "finetune.dev/record"
"""Label of an image that a FineTuneJob wrote: its finetune.json."""
_INDEX: Final = "application/vnd.oci.image.index.v1+json"
_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
_LAYER: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
_TITLE: Final = "org.opencontainers.image.title"
_ARCHITECTURES: Final = ("amd64", "arm64")
_EPOCH: Final = "1970-01-01T00:00:00Z"


class _Layer(NamedTuple):
    descriptor: dict[str, Any]
    diff_id: str
    """Digest of the tar."""


class ImageStore:
    """A tag of a repository."""

    def __init__(self, location: Location, roots: Roots) -> None:
        self.uri = location.uri
        self.digest: str | None = None
        """Of what was read or published last."""
        self._tag = locations.parse(location.uri).revision or "latest"
        self._registry = Registry(location, roots, actions="pull,push")

    def names(self) -> list[str]:
        """See WholeStore."""
        there = self._registry.manifest(self._tag)
        if there is None:
            return []
        manifest = _first_image(self._registry, there)
        record = _record(self._registry, manifest)
        if record is None or not all(self._registry.has(layer["digest"]) for layer in manifest["layers"]):
            return []
        files: dict[str, str] = json.loads(record)["files"]
        return sorted(files)

    def record(self) -> bytes | None:
        """See WholeStore."""
        there = self._registry.manifest(self._tag)
        if there is None:
            return None
        record = _record(self._registry, _first_image(self._registry, there))
        if record is None:
            raise UserError(f"spec.output: {self.uri} is an image that no FineTuneJob wrote; choose a tag of its own")
        self.digest = there.digest
        return record.encode()

    def check_writable(self) -> None:
        """See WholeStore."""
        self._registry.check_writable()

    def publish(self, folder: Path, record: bytes, summary: str) -> str:
        """See WholeStore. The tag is moved last."""
        scratch = folder.with_name(f"{folder.name}.layer")
        layers = []
        try:
            for title, names in _grouped(folder):
                layer = _pack(folder, names, scratch, title)
                self._registry.upload(scratch)
                layers.append(layer)
            manifests = [self._put_image(scratch, layers, machine, record, summary) for machine in _ARCHITECTURES]
        finally:
            scratch.unlink(missing_ok=True)
        index = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": manifests, "annotations": _annotations(summary)}
        self.digest = self._registry.put_manifest(self._tag, _INDEX, _canonical(index))
        return self.digest

    def _put_image(
        self, scratch: Path, layers: list[_Layer], machine: str, record: bytes, summary: str
    ) -> dict[str, Any]:
        """Its descriptor."""
        config = {
            "architecture": machine,
            "os": "linux",
            "created": _EPOCH,
            "config": {"Labels": {LABEL: record.decode(), **_annotations(summary)}},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created": _EPOCH, "created_by": "finetune-operator"} for _ in layers],
        }
        scratch.write_bytes(_canonical(config))
        digest = self._registry.upload(scratch)
        manifest = _canonical(
            {
                "schemaVersion": 2,
                "mediaType": _MANIFEST,
                "config": {"mediaType": _CONFIG, "digest": digest, "size": scratch.stat().st_size},
                "layers": [layer.descriptor for layer in layers],
                "annotations": _annotations(summary),
            }
        )
        named = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        self._registry.put_manifest(named, _MANIFEST, manifest)
        platform = {"architecture": machine, "os": "linux"}
        return {"mediaType": _MANIFEST, "digest": named, "size": len(manifest), "platform": platform}


def fetch(location: Location, into: Path, roots: Roots) -> Path:
    """The files of an image as a folder.

    Raises:
        UserError: there is no such image, or it is one of a program.
    """
    registry = Registry(location, roots, actions="pull")
    there = registry.manifest(locations.parse(location.uri).revision or "latest")
    if there is None:
        raise UserError(f"{location.uri}: there is no such image; correct the uri")
    target = into / there.digest.removeprefix("sha256:")[:16]
    if target.is_dir():
        return target
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for layer in _first_image(registry, there).get("layers", []):
        blob = into / "layer"
        blob.unlink(missing_ok=True)
        registry.download(layer["digest"], blob)
        unpack(location, blob, part)
        blob.unlink()
    part.rename(target)
    return target


def _first_image(registry: Registry, there: Manifest) -> dict[str, Any]:
    """An image's manifest. Those of an index that we wrote differ in the name of a machine only."""
    if "manifests" not in there.content:
        return there.content
    listed = [
        each for each in there.content["manifests"] if each.get("mediaType", _MANIFEST).endswith("manifest.v1+json")
    ]
    found = registry.manifest(listed[0]["digest"]) if listed else None
    return found.content if found else {}


def _record(registry: Registry, manifest: dict[str, Any]) -> str | None:
    """finetune.json of an image that a FineTuneJob wrote."""
    config = manifest.get("config", {})
    if config.get("mediaType") != _CONFIG:
        return None
    labels = (json.loads(registry.blob(config["digest"])).get("config") or {}).get("Labels") or {}
    found: str | None = labels.get(LABEL)
    return found


def _grouped(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Names of the files of each layer, with a title. All titles mean the folder itself, and no two are equal: oras wants that."""
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    small = sorted(name for name, size in files.items() if size < LARGE)
    groups = ([small] if small else []) + [[name] for name in sorted(files.keys() - set(small))]
    for i, names in enumerate(groups):
        yield "/".join("." * (i + 1)), names


def _pack(folder: Path, names: list[str], target: Path, title: str) -> _Layer:
    """Writes a layer."""
    with target.open("wb") as out, gzip.GzipFile("", "wb", 0, out, mtime=0) as packed:
        tee = _Hashing(packed)
        with tarfile.open(fileobj=tee, mode="w|", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
            for parent in sorted({str(p) for name in names for p in PurePosixPath(name).parents} - {"."}):
                entry = tarfile.TarInfo(parent)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)
            for name in names:
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = (folder / name).stat().st_size, 0o644
                with (folder / name).open("rb") as file:
                    archive.addfile(entry, file)
    with target.open("rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    diff_id = f"sha256:{tee.digest.hexdigest()}"
    annotations = {_TITLE: title, "io.deis.oras.content.unpack": "true"}
    size = target.stat().st_size
    return _Layer({"mediaType": _LAYER, "digest": digest, "size": size, "annotations": annotations}, diff_id)


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, out: gzip.GzipFile) -> None:
        self.digest = hashlib.sha256()
        self._out = out

    def write(self, data: bytes) -> int:
        """Writes."""
        self.digest.update(data)
        return self._out.write(data)


def unpack(location: Location, blob: Path, into: Path) -> None:
    """Adds a layer's files. Nothing gets out of the folder, and links are refused."""
    try:
        with tarfile.open(blob, "r:*") as archive:
            for entry in archive:
                path = PurePosixPath(entry.name)
                if path.name.startswith(".wh."):
                    raise UserError(f"{location.uri}: is the image of a program and no model; correct the uri")
                if path.is_absolute() or ".." in path.parts or not (entry.isfile() or entry.isdir()):
                    raise UserError(f"{location.uri}: {path} is no file in a folder; name an image of plain files")
                target = into / path if entry.isdir() else (into / path).parent
                target.mkdir(parents=True, exist_ok=True)
                if content := archive.extractfile(entry):
                    with content, (into / path).open("wb") as file:
                        shutil.copyfileobj(content, file)
    except tarfile.TarError as error:
        raise UserError(
            f"{location.uri}: holds a layer that is no tar of files ({type(error).__name__}); name an image that a FineTuneJob wrote"
        ) from None


def _annotations(summary: str) -> dict[str, str]:
    return {"org.opencontainers.image.description": summary}


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
