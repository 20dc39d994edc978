"""`finetune local`: a pod's surroundings on this machine, and the supervisor in them; `finetune data`: a look at the rows. Called by cli.

The same program runs as in a pod: claims, ConfigMaps and Secrets are laid out below one folder as a pod has them mounted, the resolved
job is a file there, and progress goes to a server on loopback. Checkpoints and output lie on the claims' folders, so the same command
run again goes on where it stopped.
"""

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from finetune_crds import locations, names, validation
from finetune_crds.resolution import Defaults, resolve
from finetune_crds.resolved import ResolvedFineTune, ResolvedJob
from finetune_crds.v1alpha1 import FineTuneJob, Inputs, Location
from finetune_crds.v1alpha1.pods import EnvironmentVariable
from finetune_crds.verdict import ExitCode, Verdict

from .. import supervisor, worker
from ..errors import UserError
from ..reporting import reporter
from ..storage.places import materialise
from ..storage.roots import ENV_ROOT, Roots
from ..storage.stores import open_output, open_store
from .manifests import Manifests
from .progress_bar import ProgressServer, Screen

if TYPE_CHECKING:
    from ..context import RunContext

VOLUMES: Final = Path("finetune-volumes")
"""Where claims lie that no --claim names, below the current folder."""
_PLACE: Final = ("uri", "job", "secretRef", "endpoint", "region")
"""What of a model or an output says where it lies."""
_POLL = 0.2
_REPORT_SECONDS = "0.5"


@dataclass(frozen=True)
class Options:
    """What the command line says besides the manifest."""

    output: Path | None = None
    model: Path | None = None
    gpus: int | None = None
    claims: Mapping[str, Path] = field(default_factory=dict)
    secrets: Mapping[str, Path] = field(default_factory=dict)
    scratch: Path | None = None
    debug: bool = False


@dataclass(frozen=True)
class Result:
    """How a run ended, and where its things lie."""

    verdict: Verdict
    job: ResolvedJob
    roots: Roots
    log: Path

    @property
    def output(self) -> Location:
        """Where the result was to go."""
        assert self.job.spec.output is not None
        return self.job.spec.output


def check(manifest: dict[str, Any], *, cluster: bool) -> ResolvedJob:
    """A manifest with every default filled in.

    Raises:
        UserError: it breaks a rule; one line for each.
    """
    try:
        job: FineTuneJob = validation.check(manifest, cluster=cluster)
    except validation.InvalidJob as error:
        raise UserError(str(error)) from None
    return resolve(job, Defaults(trainer_image="finetune-trainer"))


def adapt(manifest: dict[str, Any], options: Options) -> tuple[dict[str, Any], list[str]]:
    """The manifest as this machine can run it, and a line for each thing that differs."""
    spec = dict(manifest.get("spec") or {})
    notes: list[str] = []
    if options.model:
        folder = _folder(options.model, "--model")
        notes.append(f"model: {_uri(spec.get('model'))} is read from {folder}")
        spec["model"] = _moved(spec.get("model"), folder)
    if options.output:
        notes.append(f"output: {_uri(spec.get('output'))} is written to {options.output.resolve()}")
        spec["output"] = _moved(spec.get("output"), options.output.resolve())
    resources = dict(spec.get("resources") or {})
    if resources.get("nodes", 1) != 1:
        notes.append(
            f"resources.nodes: {resources['nodes']} is 1 here; the result is the same within rounding, unless dropout or noise is drawn"
        )
        resources["nodes"] = 1
    if options.gpus is not None and resources.get("gpusPerNode", 1) != options.gpus:
        notes.append(f"resources.gpusPerNode: {resources.get('gpusPerNode', 1)} is {options.gpus} here")
        resources["gpusPerNode"] = options.gpus
    return {**manifest, "spec": {**spec, "resources": resources}}, notes


def _uri(given: Any) -> Any:
    return given.get("uri") if isinstance(given, dict) else given


def _moved(given: Any, folder: Path) -> dict[str, Any]:
    """The same, but for its place. What is no object is not checked here: nothing of it stays."""
    kept = {name: value for name, value in (given if isinstance(given, dict) else {}).items() if name not in _PLACE}
    return {**kept, "uri": f"file://{folder}"}


def look(manifests: Manifests, options: Options, screen: Screen, into: Path) -> tuple[Inputs, list[str]]:
    """Prepares the rows on this machine's CPU and writes their report into a folder; nothing is trained.

    Returns:
        The inputs as status would tell them, and the report's findings.

    Raises:
        UserError, DataError: manifest, options or rows are wrong.
    """
    _, spec, scratch = _begin(manifests, options, screen)
    with _alone(scratch):
        context = _context(scratch, spec, manifests, options, screen)
        from ..reporting import data_report  # what follows needs torch, which takes seconds
        from ..setup import read

        reading = read(spec, context)
        into.mkdir(parents=True, exist_ok=True)
        found = data_report.files(reading.spec, reading.rows, reading.division, reading.tokenizer)
        for name, content in found.items():
            (into / name).write_bytes(content)
        return reading.inputs, data_report.report(reading.spec, reading.rows, reading.division).findings


def preflight(manifests: Manifests, options: Options, screen: Screen) -> Verdict:
    """Checks everything up to the first step on this machine's CPU, as a preflight's pod does. Never raises for what is wrong with the job.

    Raises:
        UserError: manifest or options are wrong.
    """
    job, spec, scratch = _begin(manifests, options, screen)
    with _alone(scratch):
        worker.settle(spec)
        context = _context(scratch, spec, manifests, options, screen)
        from .. import preflight as checks

        worker.quieten()
        return checks.run(job, context)


def _context(
    scratch: Path, spec: ResolvedFineTune, manifests: Manifests, options: Options, screen: Screen
) -> "RunContext":
    """What a run in this process has besides its job."""
    roots = Roots.below(scratch)
    _lay_out(scratch, spec, manifests, options, screen)
    os.environ[ENV_ROOT] = str(scratch)
    from ..context import RunContext
    from ..ranks import Ranks

    assert spec.checkpoints.storage
    return RunContext(
        Ranks(), roots.scratch / "run", 1, "look", reporter.NullReporter(), threading.Event(),
        open_store(spec.checkpoints.storage, roots), open_output(spec.output, roots),
    )  # fmt: skip


def _begin(manifests: Manifests, options: Options, screen: Screen) -> tuple[ResolvedJob, ResolvedFineTune, Path]:
    """The resolved job, its spec, and its scratch folder."""
    manifest, notes = adapt(manifests.job, options)
    job = check(manifest, cluster=False)
    if not isinstance(job.spec, ResolvedFineTune):
        raise UserError("runtime.command: a program of your own runs in its own image; finetune local runs our trainer")
    for path, place in locations.inputs(job.spec):
        if (parsed := locations.parse(place.uri)).scheme == "job":
            raise UserError(
                f"{path}.job: finetune local knows no other jobs; say where the output of {parsed.root} lies by {path}.uri"
            )
    scratch = (options.scratch or _cache() / f"{job.name}-{job.digest.removeprefix('sha256:')[:12]}").resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    for note in notes:
        screen.say(note)
    return job, job.spec, scratch


def run(manifests: Manifests, options: Options, screen: Screen) -> Result:
    """Trains to the end, or to a Ctrl-C.

    Raises:
        UserError: manifest or options are wrong.
    """
    job, spec, scratch = _begin(manifests, options, screen)
    with _alone(scratch), ProgressServer(screen) as server:
        _lay_out(scratch, spec, manifests, options, screen)
        environment = _environment(scratch, job, server, Roots.below(scratch))
        log = scratch / "log"
        screen.say(f"log: {log}")
        with log.open("ab") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "finetune_trainer.supervisor"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=None if options.debug else sink,
                stderr=None if options.debug else sink,
                start_new_session=True,
            )
            _follow(process, screen)
    return Result(_verdict(scratch, process.returncode), job, Roots.below(scratch), log)


def _follow(process: "subprocess.Popen[bytes]", screen: Screen) -> None:
    """Waits for the end. The first Ctrl-C or SIGTERM asks for a checkpoint, the second Ctrl-C does not wait for it."""
    asked = [0]

    def stop(number: int, frame: object) -> None:
        asked[0] += 1
        process.send_signal(signal.SIGTERM if asked[0] == 1 else signal.SIGINT)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    said, ended = 0, False
    try:
        while not ended:
            try:
                process.wait(_POLL)
                ended = True
            except subprocess.TimeoutExpired:
                pass
            if asked[0] > said:
                said = asked[0]
                screen.say("saving a checkpoint; Ctrl-C again ends at once" if said == 1 else "ending at once")
            if not ended:
                screen.refresh()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lay_out(scratch: Path, spec: ResolvedFineTune, manifests: Manifests, options: Options, screen: Screen) -> None:
    """Claims, ConfigMaps and Secrets where a pod would have them mounted."""
    roots = Roots.below(scratch)
    for folder in (roots.volumes, roots.configmaps, roots.secrets, roots.scratch):
        folder.mkdir(parents=True, exist_ok=True)
    written = {locations.parse(place.uri).root for _, place in locations.outputs(spec)}
    places = [place for _, place in (*locations.inputs(spec), *locations.outputs(spec))]
    for name in sorted({locations.parse(place.uri).root for place in places if place.uri.startswith("pvc://")}):
        _link(roots.volumes / name, _claim(name, options, screen, make=name in written))
    for name in sorted({place.secret_ref.name for place in places if place.secret_ref}):
        _link(roots.secrets / name, _secret(name, options))
    for name, keys in manifests.configmaps.items():
        (roots.configmaps / name).mkdir(exist_ok=True)
        for key, content in keys.items():
            file = roots.configmaps / name / key
            if not file.is_file() or file.read_bytes() != content:  # what is as it was need not be prepared again
                file.write_bytes(content)
    for variable in spec.runtime.env or []:
        if variable.value_from and variable.value_from.secret_key_ref:
            name = variable.value_from.secret_key_ref.name
            _link(roots.secrets / name, _secret(name, options))
    _check_inputs(spec, roots)


def _check_inputs(spec: ResolvedFineTune, roots: Roots) -> None:
    """What a glance at this disk can tell need not wait for torch."""
    for field_path, place in locations.inputs(spec):
        if locations.parse(place.uri).scheme in ("pvc", "file", "configmap") and "*" not in place.uri:
            try:
                materialise(place, roots.scratch, roots)
            except UserError as error:
                hint = (
                    "; put it there, or name a model that is on this disk: --model DIR" if field_path == "model" else ""
                )
                raise UserError(f"{field_path}: {error}{hint}") from None


def _claim(name: str, options: Options, screen: Screen, *, make: bool) -> Path:
    given = options.claims.get(name)
    if given is not None:
        return _folder(given, f"--claim {name}")
    folder = (VOLUMES / name).absolute()
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        raise UserError(
            f"pvc://{name}: say where the files of this claim lie: --claim {name}=DIR (or put them into {folder})"
        )
    screen.say(f"claim {name}: {folder} (--claim {name}=DIR for another folder)")
    return folder


def _secret(name: str, options: Options) -> Path:
    if name not in options.secrets:
        raise UserError(f"secretRef {name}: say where its keys lie, one file each: --secret {name}=DIR")
    return _folder(options.secrets[name], f"--secret {name}")


def _folder(path: Path, option: str) -> Path:
    if not path.is_dir():
        raise UserError(f"{option}: {path} is no folder")
    return path.resolve()


def _link(link: Path, target: Path) -> None:
    if link.is_symlink():
        link.unlink()
    link.symlink_to(target)


def _environment(scratch: Path, job: ResolvedJob, server: ProgressServer, roots: Roots) -> dict[str, str]:
    """What the pod builder would set."""
    token, job_file, message = scratch / "token", scratch / "job.json", _message(scratch)
    token.touch(mode=0o600)
    token.write_text(server.token)
    job_file.write_text(job.model_dump_json(by_alias=True, exclude_none=True), encoding="utf-8")
    message.unlink(missing_ok=True)
    theirs = {variable.name: _value(variable, roots) for variable in job.spec.runtime.env or []}
    kept = {k: v for k, v in os.environ.items() if not re.match(r"FINETUNE_|KUBEFLOW_TRAINER_SERVER_", k)}
    return kept | theirs | {
        ENV_ROOT: str(scratch),
        supervisor.ENV_TERMINATION_FILE: str(message),
        reporter.ENV_INTERVAL: _REPORT_SECONDS,
        names.ENV_JOB_FILE: str(job_file),
        names.ENV_ATTEMPT: "1",
        names.ENV_RUN_ID: str(uuid.uuid4()),
        names.ENV_PROCESSES_PER_NODE: str(max(1, job.spec.resources.gpus_per_node)),
        names.ENV_MASTER_PORT: str(_free_port()),
        names.ENV_GRACE_SECONDS: str(job.spec.checkpoints.grace_period_seconds),
        names.ENV_PROGRESS_URL: server.url,
        names.ENV_PROGRESS_TOKEN: str(token),
    }  # fmt: skip


def _value(variable: EnvironmentVariable, roots: Roots) -> str:
    if variable.value_from is None:
        return variable.value or ""
    chosen = variable.value_from.secret_key_ref or variable.value_from.config_map_key_ref
    assert chosen is not None
    root = roots.secrets if variable.value_from.secret_key_ref else roots.configmaps
    try:
        return (root / chosen.name / chosen.key).read_text(encoding="utf-8")
    except OSError:
        raise UserError(f"runtime.env {variable.name}: {chosen.name} has no key {chosen.key} here") from None


def _verdict(scratch: Path, returncode: int) -> Verdict:
    try:
        return Verdict.model_validate_json(_message(scratch).read_bytes())
    except (OSError, ValueError):
        code = returncode if returncode >= 0 else 128 - returncode
        return Verdict(code=code or ExitCode.INTERNAL_ERROR, message="the supervisor ended without a word; see the log")


def _message(scratch: Path) -> Path:
    return scratch / "termination-log"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "finetune"


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@contextmanager
def _alone(scratch: Path) -> Iterator[None]:
    """One run of a job at a time."""
    with (scratch / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"this job runs already (scratch {scratch} is in use); wait for it, or stop it") from None
        yield
