"""What the layers of an image may hold: plain files, wherever Python's own filter for archives is not there yet (Debian's 3.11.2)."""

import io
import tarfile
from pathlib import Path

import pytest

from finetune_crds.v1alpha1 import Location
from finetune_trainer.errors import UserError
from finetune_trainer.storage.images import unpack

LOCATION = Location(uri="oci://registry/team/bot:v1")


def layer(folder: Path, *entries: tuple[str, bytes, str]) -> Path:
    """A layer of (name, kind, content or target of a link)."""
    with tarfile.open(folder / "layer", "w:gz") as archive:
        for name, kind, content in entries:
            entry = tarfile.TarInfo(name)
            entry.type = kind
            if kind == tarfile.REGTYPE:
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content.encode()))
            else:
                entry.linkname = content
                archive.addfile(entry)
    return folder / "layer"


def test_files_and_folders_come_out_in_their_places(tmp_path: Path) -> None:
    blob = layer(
        tmp_path,
        ("adapter/", tarfile.DIRTYPE, ""),
        ("adapter/config.json", tarfile.REGTYPE, "{}"),
        ("./a/b.txt", tarfile.REGTYPE, "deep"),
        ("none", tarfile.REGTYPE, ""),
    )
    unpack(LOCATION, blob, tmp_path / "into")
    found = {path.relative_to(tmp_path / "into").as_posix(): path for path in (tmp_path / "into").rglob("*")}
    assert set(found) == {"adapter", "adapter/config.json", "a", "a/b.txt", "none"}
    assert (found["a/b.txt"].read_text(), found["none"].read_text()) == ("deep", "")


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("../out", tarfile.REGTYPE, "x"),
        ("a/../../out", tarfile.REGTYPE, "x"),
        ("/out", tarfile.REGTYPE, "x"),
        ("link", tarfile.SYMTYPE, "../out"),
        ("link", tarfile.LNKTYPE, "../out"),
        ("pipe", tarfile.FIFOTYPE, ""),
    ],
)
def test_nothing_else_does(tmp_path: Path, name: str, kind: bytes, target: str) -> None:
    blob = layer(tmp_path, (name, kind, target))
    with pytest.raises(UserError, match="no file in a folder"):
        unpack(LOCATION, blob, tmp_path / "into")
    assert not (tmp_path / "out").exists() and not any((tmp_path / "into").glob("*"))


def test_an_image_of_a_program_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="image of a program"):
        unpack(LOCATION, layer(tmp_path, ("etc/.wh.passwd", tarfile.REGTYPE, "")), tmp_path / "into")


def test_what_is_no_archive_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"no archive at all")
    with pytest.raises(UserError, match="no tar of files"):
        unpack(LOCATION, tmp_path / "blob", tmp_path / "into")
