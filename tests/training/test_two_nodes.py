"""Two nodes, each with a disk and a copy of a ConfigMap of its own."""

import os
from pathlib import Path
from typing import Any

from cluster.ports import free_port
from finetune_trainer import setup
from finetune_trainer.errors import UserError
from finetune_trainer.ranks import Ranks
from finetune_trainer.storage.roots import ENV_ROOT

from . import tiny


def test_each_opens_what_it_prepared(tmp_path: Path) -> None:
    rows = tiny.chat_rows(20)
    folders = [Path(said) for said in read_by(tmp_path, rows, rows)]
    assert [folder.parent for folder in folders] == [tmp_path / f"scratch{i}/prepared" for i in (0, 1)]


def test_other_content_is_refused(tmp_path: Path) -> None:
    for said in read_by(tmp_path, tiny.chat_rows(20), tiny.chat_rows(20, seed=8)):
        assert "nodes of this job read different content" in said


def read_by(folder: Path, *contents: list[dict[str, Any]]) -> list[str]:
    """Where each node's rows lie, or why it refused."""
    model = tiny.make_model(folder / "model")
    port = free_port()
    children = [_fork(folder, model, node, rows, len(contents), port) for node, rows in enumerate(contents)]
    for child in children:
        os.waitpid(child, 0)
    return [(folder / f"said{node}").read_text() for node in range(len(contents))]


def _fork(folder: Path, model: Path, node: int, rows: list[dict[str, Any]], nodes: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        root = folder / f"root{node}"
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), ENV_ROOT: str(root)}
        os.environ |= {"RANK": str(node), "WORLD_SIZE": str(nodes), "LOCAL_RANK": "0"}
        file = tiny.write_rows(root / "configmaps/rows/train.jsonl", rows)
        os.utime(file, (node + 1, node + 1))
        job = tiny.job(folder, model, [{"uri": "configmap://rows/train.jsonl"}], training={"sequenceLength": 64})
        context = tiny.context(job, folder / f"scratch{node}", ranks=Ranks.join(gpu=False))
        try:
            said = str(setup.read(job.spec, context).rows.folder)  # type: ignore[arg-type]
        except UserError as error:
            said = str(error)
        (folder / f"said{node}").write_text(said)
    finally:
        os._exit(0)
