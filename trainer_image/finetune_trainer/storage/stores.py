"""Places that results are written to. Called by checkpoints and publish.

A folder (a claim, a local folder, an S3 prefix) takes files one by one; an OCI tag or a repository of the hub takes an output as a whole,
and no checkpoints. Both kinds of folders promise the same: a name appears whole or not at all, `create_exclusive` succeeds for exactly one of several writers,
and what it wrote is durable before it returns. On volumes that is fsync, link and fsync of the folder; on S3 a conditional PUT.
"""

import ctypes
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from finetune_crds import locations
from finetune_crds.v1alpha1 import Location

from ..errors import AlreadyExists, StorageError, UserError
from . import s3
from .hub import HubStore
from .images import ImageStore
from .places import local_path
from .roots import Roots

_CHUNK = 16 * 1024 * 1024
_TEMPORARY = ".tmp-"
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


class FolderStore(Protocol):
    """A folder of named files; names are relative with / between parts."""

    uri: str
    local: Path | None
    """The folder itself where it is on a file system: libraries may write there, then `settle` makes it fit to be read."""

    def names(self, prefix: str = "") -> list[str]:
        """Every file below the folder `prefix`, sorted; empty when there is none."""
        ...

    def read(self, name: str) -> bytes:
        """Content of a file. Raises FileNotFoundError when it is not there."""
        ...

    def write_file(self, name: str, source: Path | bytes) -> None:
        """Writes a file of any size, durably, replacing what was there."""
        ...

    def create_exclusive(self, name: str, data: bytes) -> None:
        """Writes a file that must not exist yet. Raises AlreadyExists."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Writes a small file, atomically replacing what was there."""
        ...

    def delete(self, prefix: str) -> None:
        """Removes the file of that name and every file below the folder of that name. Nothing there is no error."""
        ...


@runtime_checkable
class WholeStore(Protocol):
    """A place that takes an output as a whole and in one step."""

    uri: str
    digest: str | None
    """What tools ask for this output by, once it was looked at or published; None: they do not."""

    def record(self) -> bytes | None:
        """finetune.json of the output that is there; None when nothing is. Raises UserError when it is not ours."""
        ...

    def names(self) -> list[str]:
        """Every file that is there and can be had."""
        ...

    def check_writable(self) -> None:
        """Raises UserError when nothing may be written, before time is spent on it."""
        ...

    def publish(self, folder: Path, record: bytes, summary: str) -> str | None:
        """Puts a folder in the place of what is there, and tells its digest. `folder` holds the record too; `summary` is for people."""
        ...


def open_output(location: Location, roots: Roots | None = None) -> FolderStore | WholeStore:
    """The place of an output.

    Raises:
        UserError: the claim or Secret is not mounted, or the scheme cannot be written to.
    """
    roots = roots or Roots.from_environment()
    if locations.parse(location.uri).scheme == "oci":
        return ImageStore(location, roots)
    if locations.parse(location.uri).scheme == "hf":
        return HubStore(location, roots)
    return open_store(location, roots)


def open_store(location: Location, roots: Roots | None = None) -> FolderStore:
    """The store of a pvc://, file:// or s3:// location. A folder that is not there yet is made at the first write.

    Raises:
        UserError: the claim is not mounted, or the scheme cannot be written to.
    """
    roots = roots or Roots.from_environment()
    scheme = locations.parse(location.uri).scheme
    if scheme == "s3":
        return S3Folder(location, roots)
    if scheme in ("pvc", "file"):
        return VolumeFolder(location.uri, local_path(location, roots))
    raise UserError(f"{location.uri}: {scheme}:// cannot be written to; use pvc:// or s3://")


class VolumeFolder:
    """A folder on a mounted claim or a local disk."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri = uri.rstrip("/")
        self.folder = folder
        self.local: Path | None = folder

    def names(self, prefix: str = "") -> list[str]:
        """See FolderStore."""
        with self._errors():
            return sorted(
                path.relative_to(self.folder).as_posix()
                for path in (self.folder / prefix).rglob("*")
                if path.is_file() and not path.name.startswith(_TEMPORARY)
            )

    def read(self, name: str) -> bytes:
        """See FolderStore."""
        with self._errors():
            return (self.folder / name).read_bytes()

    def write_file(self, name: str, source: Path | bytes) -> None:
        """See FolderStore."""
        with self._errors(), self._temporary(name, source) as (temporary, target):
            temporary.replace(target)
            _sync(target.parent)

    def replace(self, name: str, data: bytes) -> None:
        """See FolderStore."""
        self.write_file(name, data)

    def create_exclusive(self, name: str, data: bytes) -> None:
        """See FolderStore."""
        with self._errors(), self._temporary(name, data) as (temporary, target):
            try:
                _move_without_replacing(temporary, target)
            except FileExistsError:
                raise AlreadyExists(f"{self.uri}/{name}: written by somebody else first") from None
            _sync(target.parent)

    def delete(self, prefix: str) -> None:
        """See FolderStore."""
        with self._errors():
            path = self.folder / prefix
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            if path.parent.is_dir():
                _sync(path.parent)

    @contextmanager
    def _temporary(self, name: str, content: Path | bytes) -> Iterator[tuple[Path, Path]]:
        """A durable file beside its target, gone at the end unless it was moved there."""
        target = self.folder / name
        make_folder(target.parent)
        temporary = target.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as out:
                if isinstance(content, Path):
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, out, _CHUNK)
                else:
                    out.write(content)
                out.flush()
                os.fchmod(out.fileno(), _file_mode(target.parent))
                os.fsync(out.fileno())
            yield temporary, target
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _storage_error(self.uri, self.folder, error) from error


class S3Folder:
    """A prefix in a bucket."""

    local: Path | None = None

    def __init__(self, location: Location, roots: Roots) -> None:
        self.uri = location.uri.rstrip("/")
        self._location = location
        self._client = s3.client(location, roots)
        self._prefix = locations.parse(location.uri).path

    def names(self, prefix: str = "") -> list[str]:
        """See FolderStore."""
        import obstore

        start = len(self._prefix) + 1 if self._prefix else 0
        with s3.errors(self._location):
            return sorted(
                item["path"][start:]
                for batch in obstore.list(self._client, prefix=self._key(prefix) or None)
                for item in batch
            )

    def read(self, name: str) -> bytes:
        """See FolderStore."""
        import obstore

        with s3.errors(self._location):
            try:
                return bytes(obstore.get(self._client, self._key(name)).bytes())
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
        raise FileNotFoundError(f"{self.uri}/{name}")

    def write_file(self, name: str, source: Path | bytes) -> None:
        """See FolderStore. Large files go up in parts; the parts become an object only when all have arrived."""
        self._put(name, source)

    def replace(self, name: str, data: bytes) -> None:
        """See FolderStore."""
        self._put(name, data)

    def create_exclusive(self, name: str, data: bytes) -> None:
        """See FolderStore."""
        try:
            self._put(name, data, mode="create")
        except AlreadyExists:
            # A PUT can succeed and its answer be lost: the retry then meets its own work.
            if self.read(name) != data:
                raise

    def delete(self, prefix: str) -> None:
        """See FolderStore."""
        import obstore

        doomed = [self._key(name) for name in self.names(prefix)]
        with s3.errors(self._location, writing=True):
            obstore.delete(self._client, [*doomed, self._key(prefix)])

    def _put(self, name: str, source: Path | bytes, **options: Any) -> None:
        import obstore

        with s3.errors(self._location, writing=True):
            obstore.put(self._client, self._key(name), source, chunk_size=_CHUNK, max_concurrency=4, **options)

    def _key(self, name: str) -> str:
        return "/".join(part for part in (self._prefix, name.strip("/")) if part)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents so that whoever may read the volume may read them, whatever the umask."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    folder.chmod(_folder_mode(folder.parent))
    _sync(folder.parent)


def settle(path: Path) -> None:
    """Makes a file or tree that a library wrote durable and readable (safetensors writes mode 0600 whatever the umask)."""
    if path.is_dir():
        for child in path.iterdir():
            settle(child)
        path.chmod(_folder_mode(path.parent))
    else:
        path.chmod(_file_mode(path.parent))
    _sync(path)


def _folder_mode(parent: Path) -> int:
    mode = parent.stat().st_mode
    return 0o755 | (mode & (stat.S_IWGRP | stat.S_ISGID))


def _file_mode(parent: Path) -> int:
    return 0o644 | (parent.stat().st_mode & stat.S_IWGRP)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_without_replacing(source: Path, target: Path) -> None:
    """Gives `source` the name `target` in one step. Raises FileExistsError.

    A hard link does it everywhere but on shares without links (SMB), where the kernel's exclusive rename does.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        # Over NFS a link can succeed and its answer be lost: the retry then meets its own work.
        if source.stat().st_nlink != 2:
            raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        _rename_noreplace(source, target)


def _rename_noreplace(source: Path, target: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2: Callable[..., int] = libc.renameat2
    if renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def _storage_error(uri: str, folder: Path, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{uri}: no space left; enlarge the volume, or free some of it")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(
            f"{uri}: not writable for user {os.geteuid()} ({error.strerror}); change the owner of the folder, or set runtime.runAsUser"
        )
    return StorageError(f"{uri}: {error.strerror or type(error).__name__}")
