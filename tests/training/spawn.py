"""Several ranks as forks of this process: torch and transformers are imported once, and a run costs no start-up."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from cluster.ports import free_port
from finetune_crds.resolved import ResolvedJob
from finetune_crds.verdict import Verdict
from finetune_trainer.ranks import Ranks
from finetune_trainer.train import run

from . import tiny


def run_ranks(
    job: ResolvedJob,
    folder: Path,
    world: int,
    *,
    run_id: str = "run",
    stop_at: int | None = None,
    reporter: tiny.Recorder | None = None,
) -> Verdict:
    """Runs a job with so many ranks; the first one's verdict. One rank runs in this process. `stop_at`, or a `reporter` that stops, is the last rank's."""
    reporter = reporter or tiny.Recorder(stop_at=stop_at)
    if world == 1:
        return run(job, tiny.context(job, folder / "scratch", run_id=run_id, reporter=reporter))

    def work(ranks: Ranks) -> None:
        told = reporter if ranks.rank == world - 1 else tiny.Recorder()
        scratch = folder / "scratch"  # of one node
        verdict = run(job, tiny.context(job, scratch, ranks=ranks, run_id=f"{run_id}-{ranks.rank}", reporter=told))
        (folder / f"verdict-{ranks.rank}.json").write_text(verdict.model_dump_json(by_alias=True))

    folder.mkdir(parents=True, exist_ok=True)
    on_ranks(world, work)
    return Verdict.model_validate_json((folder / "verdict-0.json").read_bytes())


def on_ranks(world: int, work: Callable[[Ranks], None]) -> None:
    """Does work in so many processes that have met. What one raises is printed, and fails the test."""
    port = free_port()
    children = [_fork(work, rank, world, port) for rank in range(world)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), f"exit codes of the ranks: {codes}"


def _fork(work: Callable[[Ranks], None], rank: int, world: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        work(Ranks.join(gpu=False))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
