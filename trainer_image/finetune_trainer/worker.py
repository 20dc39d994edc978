"""One training process: `python -m finetune_trainer.worker`, started by the supervisor once for each GPU (or once, without GPUs).

Reads the resolved job from FINETUNE_JOB_FILE and who it is from RANK, WORLD_SIZE and LOCAL_RANK; leaves its verdict in
$FINETUNE_VERDICT_DIR/rank-<RANK>.json and exits with the verdict's code. SIGTERM asks it to save and stop. With the argument `preflight`
it checks everything up to the first step, on a CPU, and does not train.
"""

import logging
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Final

from finetune_crds import names
from finetune_crds.resolved import ResolvedFineTune, ResolvedJob
from finetune_crds.verdict import Verdict

from . import devices, lifeline, logs
from .errors import UserError, verdict_of
from .reporting import verdicts
from .storage.roots import Roots

_NO_GPU: Final = "resources.gpusPerNode: this container sees no GPU that torch can use; check the driver, or set it to 0 (finetune local: --gpus 0)"


def main() -> int:
    """Entry point. Returns the exit code."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())  # before the slow imports: a stop must find somebody listening
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lifeline.stop_with_supervisor()
    rank = os.environ.get("RANK", "0")
    logs.begin(logging.INFO, f"%(asctime)s %(name)s[{rank}] %(message)s")
    verdict = _verdict(stop, checks=sys.argv[1:] == [names.PREFLIGHT])
    verdicts.write(verdict)
    return verdict.code


def _verdict(stop: threading.Event, *, checks: bool) -> Verdict:
    try:
        job = ResolvedJob.model_validate_json(Path(os.environ.get(names.ENV_JOB_FILE, names.JOB_FILE)).read_bytes())
        spec = job.spec
        if not isinstance(spec, ResolvedFineTune) or spec.checkpoints.storage is None:
            raise UserError(
                "spec: model, dataset and output are missing, and there is no runtime.command to run instead"
            )
        gpu = spec.resources.gpus_per_node > 0 and not checks
        if gpu and devices.no_gpu():
            raise UserError(_NO_GPU)
        settle(spec)
        import torch

        from . import preflight
        from .context import RunContext
        from .ranks import Ranks
        from .reporting.reporter import NullReporter, open_reporter
        from .storage.stores import open_output, open_store
        from .train import run

        quieten()
        if gpu and not torch.cuda.is_available():
            raise UserError(_NO_GPU)
        ranks = Ranks.join(gpu=gpu)
        reporter = open_reporter() if ranks.first and not checks else NullReporter()
        try:
            verdict = (preflight.run if checks else run)(
                job,
                RunContext(
                    ranks=ranks,
                    scratch=Roots.from_environment().scratch / "run",
                    attempt=int(os.environ.get(names.ENV_ATTEMPT, "1")),
                    run_id=os.environ.get(names.ENV_RUN_ID) or f"local-{os.getpid()}",
                    reporter=reporter,
                    stop=stop,
                    checkpoints=open_store(spec.checkpoints.storage),
                    output=open_output(spec.output),
                ),
            )
        finally:
            reporter.close()
        if verdict.code == 0:
            ranks.leave()
        return verdict
    except Exception as error:
        logging.getLogger("finetune.worker").error("%s", type(error).__name__)
        return verdict_of(error)


def quieten() -> None:
    """Progress bars and hints for developers of transformers are no use in a pod's log."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)


def settle(spec: ResolvedFineTune) -> None:
    """What must be said before torch and transformers are imported."""
    adamw = spec.training.optimizer.adamw
    if spec.method.qlora is None and adamw.bits == 32 and not adamw.paged:
        # peft imports it wherever it is installed, and that takes four seconds.
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Threads that wait for work by spinning starve the ones that have it wherever cores are shared or limited: seven times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


if __name__ == "__main__":
    sys.exit(main())
