"""The store on a volume: whole or not at all, one winner, readable by others, and full disks told as such."""

import multiprocessing
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_crds.v1alpha1 import Location
from finetune_trainer.errors import AlreadyExists, StorageError, UserError
from finetune_trainer.storage import stores
from finetune_trainer.storage.roots import Roots
from finetune_trainer.storage.stores import VolumeFolder, open_store, settle


@pytest.fixture
def store(tmp_path: Path) -> VolumeFolder:
    return VolumeFolder("pvc://models/bot/", tmp_path / "bot")


@pytest.fixture(params=[0o022, 0o077], ids=["umask 022", "umask 077"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_what_is_written_is_read_listed_and_deleted(store: VolumeFolder, tmp_path: Path) -> None:
    assert store.names() == []
    shard = tmp_path / "shard"
    shard.write_bytes(b"weights")
    store.write_file("step-2/weights", shard)
    store.write_file("step-2/index.json", b"{}")
    store.replace("latest", b"1")
    store.replace("latest", b"2")
    assert store.names() == ["latest", "step-2/index.json", "step-2/weights"]
    assert store.names("step-2") == ["step-2/index.json", "step-2/weights"]
    assert store.names("step-1") == []
    assert (store.read("latest"), store.read("step-2/weights")) == (b"2", b"weights")
    store.delete("step-2")
    store.delete("step-2")
    store.delete("latest")
    assert store.names() == []
    with pytest.raises(FileNotFoundError):
        store.read("latest")


def test_the_second_writer_is_told_and_changes_nothing(store: VolumeFolder) -> None:
    store.create_exclusive("epoch-3", b"mine")
    with pytest.raises(AlreadyExists, match="pvc://models/bot/epoch-3"):
        store.create_exclusive("epoch-3", b"theirs")
    assert store.read("epoch-3") == b"mine"
    assert list(store.folder.iterdir()) == [store.folder / "epoch-3"]


def _race(
    folder: Path, name: bytes, barrier: "multiprocessing.synchronize.Barrier", wins: "multiprocessing.Queue[bytes]"
) -> None:
    store = VolumeFolder("pvc://models/bot", folder)
    for turn in range(20):
        barrier.wait()
        try:
            store.create_exclusive(f"epoch-{turn}", name)
            wins.put(name)
        except AlreadyExists:
            pass


def test_of_many_writers_exactly_one_wins(store: VolumeFolder) -> None:
    fork = multiprocessing.get_context("fork")
    barrier, wins = fork.Barrier(4), fork.Queue()
    racers = [fork.Process(target=_race, args=(store.folder, bytes([65 + i]), barrier, wins)) for i in range(4)]
    store.replace("x", b"")
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    winners = [wins.get(timeout=5) for _ in range(20)]
    assert wins.empty()
    assert sorted(winners) == sorted(store.read(f"epoch-{turn}") for turn in range(20))


def test_exclusive_rename_takes_over_where_links_do_not_work(
    store: VolumeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    store.create_exclusive("epoch-1", b"mine")
    with pytest.raises(AlreadyExists):
        store.create_exclusive("epoch-1", b"theirs")
    assert store.read("epoch-1") == b"mine"


@pytest.mark.usefixtures("umask")
def test_others_can_read_what_was_written(store: VolumeFolder) -> None:
    store.write_file("a/b/file", b"x")
    store.create_exclusive("a/commit", b"x")
    for path in (store.folder, store.folder / "a", store.folder / "a/b"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
    for path in (store.folder / "a/b/file", store.folder / "a/commit"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.usefixtures("umask")
def test_a_volume_that_its_group_may_write_stays_so(store: VolumeFolder) -> None:
    store.folder.parent.chmod(0o2775)
    store.write_file("a/file", b"x")
    assert stat.S_IMODE((store.folder / "a").stat().st_mode) == 0o2775
    assert stat.S_IMODE((store.folder / "a/file").stat().st_mode) == 0o664


@pytest.mark.usefixtures("umask")
def test_settle_opens_what_a_library_wrote(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    (tmp_path / "out/model.safetensors").touch(mode=0o600)
    tmp_path.chmod(0o755)
    settle(tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out/model.safetensors").stat().st_mode) == 0o644


def test_a_write_that_fails_leaves_what_was_there(store: VolumeFolder, tmp_path: Path) -> None:
    store.replace("latest", b"1")
    with pytest.raises(FileNotFoundError):
        store.write_file("latest", tmp_path / "absent")
    assert store.read("latest") == b"1"
    assert store.names() == ["latest"]
    assert len(list(store.folder.iterdir())) == 1


FULL = """
import os, sys
from pathlib import Path
from finetune_trainer.errors import StorageError
from finetune_trainer.storage.stores import VolumeFolder
store = VolumeFolder("pvc://models/bot", Path(sys.argv[1]) / "bot")
store.replace("latest", b"1")
try:
    store.write_file("weights", b"x" * 2_000_000)
except StorageError as error:
    print(error)
print(store.names(), store.read("latest"))
"""


def test_a_full_disk_is_a_storage_error_that_says_so(tmp_path: Path) -> None:
    """On a real file system of 256 KiB, in a mount namespace of its own."""
    mount = 'mount -t tmpfs -o size=256k none "$1" && exec "$2" -c "$3" "$1"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", mount, "sh"]
    run = subprocess.run([*unshare, str(tmp_path), sys.executable, FULL], capture_output=True, text=True, timeout=30)
    assert run.stdout.splitlines() == [
        "pvc://models/bot: no space left; enlarge the volume, or free some of it",
        "['latest'] b'1'",
    ], run.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_folder_of_somebody_else_is_told_with_our_user_id(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from finetune_trainer.storage.stores import VolumeFolder\n"
        "from finetune_trainer.errors import StorageError\n"
        "os.chdir('/'); os.setuid(10001)\n"
        "try: VolumeFolder('pvc://models/bot', Path(sys.argv[1])).replace('x', b'')\n"
        "except StorageError as error: print(error)"
    )
    folder = tmp_path / "bot"
    folder.mkdir(mode=0o755)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o055)
    run = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=30)
    assert "not writable for user 10001" in run.stdout, run.stderr
    assert "runtime.runAsUser" in run.stdout


def test_stores_open_by_scheme(tmp_path: Path) -> None:
    roots = Roots.below(tmp_path)
    (roots.volumes / "models").mkdir(parents=True)
    store = open_store(Location(uri="pvc://models/team/bot"), roots)
    assert store.local == roots.volumes / "models/team/bot"
    with pytest.raises(UserError, match="PersistentVolumeClaim absent is not mounted"):
        open_store(Location(uri="pvc://absent/bot"), roots)
    with pytest.raises(UserError, match="cannot be written to"):
        open_store(Location(uri="hf://org/name"), roots)


def test_temporary_files_of_a_killed_writer_are_no_names(store: VolumeFolder) -> None:
    store.replace("latest", b"1")
    (store.folder / f"{stores._TEMPORARY}0123").write_bytes(b"torn")
    assert store.names() == ["latest"]


def test_storage_error_is_what_other_trouble_becomes(store: VolumeFolder) -> None:
    store.replace("folder/file", b"")
    with pytest.raises(StorageError, match="pvc://models/bot"):
        store.read("folder")
