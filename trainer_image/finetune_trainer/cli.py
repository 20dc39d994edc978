"""The command `finetune`: trains a manifest without a cluster, or checks one."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console

from finetune_crds import locations
from finetune_crds.v1alpha1 import Location
from finetune_crds.verdict import OUTCOMES, ExitCode, Verdict

from . import logs
from .errors import TrainerError, verdict_of
from .local import manifests
from .local import run as local
from .local.progress_bar import Screen
from .results.outputs import DATA_REPORT
from .storage.places import local_path
from .storage.roots import Roots
from .storage.stores import open_store

_EXAMPLES = """\
examples:
  finetune check -f job.yaml
  finetune data -f job.yaml
  finetune preflight -f job.yaml
  finetune local -f job.yaml
  finetune local -f job.yaml --model ~/models/SmolLM2-135M-Instruct --claim datasets=./data --output ./my-adapter
"""


_HERE = {
    ExitCode.USER_ERROR: "Correct what the message names, and run the same command again.",
    ExitCode.DATA_ERROR: "Correct the rows, or dataset.columns in the manifest, and run the same command again.",
}
"""What to do, where that is not what it is in a cluster: there is nothing to apply and no annotation here."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="finetune",
        description="Fine-tunes a model as a FineTuneJob manifest says, on this machine. The same file works with kubectl apply.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "local",
        help="train without a cluster; the same command again goes on where it stopped",
        description="Trains without a cluster. Ctrl-C saves a checkpoint and stops; the same command again goes on from there.",
        epilog="Exit codes: 0 finished, 64 manifest or place wrong, 65 data wrong, 66 diverged, 75 stopped; all are in docs/local.md.",
    )
    _common(run)
    run.add_argument("--output", type=Path, metavar="DIR", help="write the result here, not to spec.output.uri")
    run.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs to use, not spec.resources.gpusPerNode; 0 trains on the CPU"
    )
    _places(run)
    run.set_defaults(action=_local)

    data = commands.add_parser(
        "data",
        help="prepare the rows, and write a report of them without training",
        description="Reads, renders and tokenises every row as training would, on the CPU, and writes data-report.html and data-report.json. Training on this machine finds the prepared rows.",
        epilog="Exit codes: 0 fine, 64 manifest or place wrong, 65 data wrong; all are in docs/local.md.",
    )
    _common(data)
    data.add_argument(
        "--report", type=Path, default=Path(), metavar="DIR", help="write the report here. Default: the current folder"
    )
    _places(data)
    data.set_defaults(action=_data, output=None, gpus=None)

    before = commands.add_parser(
        "preflight",
        help="check everything that needs no GPU: places, model, rows, steps, memory",
        description="Does what training would do up to its first step, on the CPU and without reading a weight, and says what it found. The preflight of a FineTuneJob in a cluster is the same program.",
        epilog="Exit codes: 0 fine, else as training would end; all are in docs/local.md.",
    )
    _common(before)
    _places(before)
    before.add_argument("--output", type=Path, metavar="DIR", help="the result is to go here, not to spec.output.uri")
    before.set_defaults(action=_preflight, gpus=None)

    check = commands.add_parser(
        "check",
        help="validate a manifest and print every default that it gets",
        description="Validates a manifest by the rules of the API server, and prints the spec with every default filled in.",
    )
    _common(check)
    check.add_argument(
        "--cluster", action="store_true", help="also apply the rules that hold in a cluster only (no file://)"
    )
    check.set_defaults(action=_check)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: that of the run's verdict."""
    options = parser().parse_args(arguments)
    logs.begin(logging.INFO if options.debug else logging.WARNING, "%(name)s %(message)s")
    try:
        return int(options.action(options))
    except Exception as error:
        if options.debug:
            raise
        verdict = verdict_of(error)
        for line in str(error if isinstance(error, TrainerError) else verdict.message).splitlines():
            print(f"error: {line}", file=sys.stderr)
        if not isinstance(error, TrainerError):
            print("This is a fault of finetune: --debug shows where.", file=sys.stderr)
        return verdict.code


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-f", "--filename", type=Path, action="append", required=True, metavar="FILE",
        help="manifest; may be repeated, and hold ConfigMaps that configmap:// locations name",
    )  # fmt: skip
    command.add_argument("--name", help="which FineTuneJob, where the files hold several")
    command.add_argument("--debug", action="store_true", help="log to the terminal, and tracebacks")


def _places(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", type=Path, metavar="DIR", help="read the model from here, not from spec.model.uri")
    command.add_argument(
        "--claim", type=_pair, action="append", default=[], metavar="NAME=DIR",
        help=f"folder that stands for a claim: pvc://NAME/path is DIR/path. Default ./{local.VOLUMES}/NAME",
    )  # fmt: skip
    command.add_argument(
        "--secret", type=_pair, action="append", default=[], metavar="NAME=DIR",
        help="folder that stands for a Secret of a secretRef, with a file for each key",
    )  # fmt: skip
    command.add_argument(
        "--scratch", type=Path, metavar="DIR", help="downloads, prepared data and log. Default ~/.cache/finetune/..."
    )


def _pair(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=DIR")
    return name, Path(folder).expanduser()


def _check(options: argparse.Namespace) -> int:
    job = local.check(manifests.load(options.filename, options.name).job, cluster=options.cluster)
    print(f"# {job.name}: valid. Every default filled in; digest {job.digest}")
    print(yaml.dump({"spec": job.spec.to_wire()}, Dumper=manifests.Dumper, sort_keys=False, allow_unicode=True), end="")
    return ExitCode.FINISHED


def _chosen(options: argparse.Namespace) -> local.Options:
    return local.Options(
        output=options.output,
        model=options.model and options.model.expanduser(),
        gpus=options.gpus,
        claims=dict(options.claim),
        secrets=dict(options.secret),
        scratch=options.scratch,
        debug=options.debug,
    )


def _data(options: argparse.Namespace) -> int:
    screen = Screen(Console(stderr=True))
    inputs, findings = local.look(
        manifests.load(options.filename, options.name), _chosen(options), screen, options.report
    )
    print(yaml.dump({"inputs": inputs.to_wire()}, Dumper=manifests.Dumper, sort_keys=False), end="")
    for finding in findings:
        print(f"note: {finding}")
    print(f"report: {(options.report / DATA_REPORT).resolve()}")
    return ExitCode.FINISHED


def _preflight(options: argparse.Namespace) -> int:
    verdict = local.preflight(
        manifests.load(options.filename, options.name), _chosen(options), Screen(Console(stderr=True))
    )
    found = {"inputs": verdict.inputs, "preflight": verdict.preflight}
    wire = {name: part.to_wire() for name, part in found.items() if part}
    if wire:
        print(yaml.dump(wire, Dumper=manifests.Dumper, sort_keys=False), end="")
    if verdict.code == ExitCode.FINISHED:
        print("passed: nothing here keeps it from training")
    else:
        _tell_why(verdict)
    return verdict.code


def _local(options: argparse.Namespace) -> int:
    screen = Screen(Console(stderr=True))
    try:
        result = local.run(manifests.load(options.filename, options.name), _chosen(options), screen)
    finally:
        screen.clear()
    verdict = result.verdict
    if verdict.code == ExitCode.FINISHED:
        _tell_finished(result)
    elif verdict.code == ExitCode.STOPPED:
        saved = verdict.checkpoints.latest if verdict.checkpoints else None
        print(f"stopped: {verdict.message}" if verdict.message else "stopped")
        print(
            f"The same command goes on from {f'step {saved.step} of {verdict.total_steps}' if saved else 'the start'}."
        )
    else:
        _tell_failed(result)
    return verdict.code


def _tell_finished(result: local.Result) -> None:
    """Answers and held-out metrics before and after, and where the result lies."""
    verdict = result.verdict
    for sample in _samples(result):
        print(f"\n> {sample['prompt']}\n  before: {sample.get('before', '')}\n  after:  {sample.get('after', '')}")
    print()
    if verdict.evaluation and verdict.evaluation.before and verdict.evaluation.after:
        after = {metric.name: metric.value for metric in verdict.evaluation.after}
        for metric in verdict.evaluation.before:
            print(f"{metric.name}: {metric.value} before, {after.get(metric.name, '?')} after")
    output = verdict.output
    if output and output.reused:
        print("This very job was trained before: its output was reused, nothing was trained.")
    kind = "model" if output and output.format == "transformers" else "adapter"
    print(f"{kind}: {_shown(result.output, result.roots)}")


def _tell_failed(result: local.Result) -> None:
    _tell_why(result.verdict)
    print(f"log: {result.log}", file=sys.stderr)


def _tell_why(verdict: Verdict) -> None:
    print(f"error: {verdict.message}", file=sys.stderr)
    if verdict.code in _HERE:
        print(_HERE[ExitCode(verdict.code)], file=sys.stderr)
    elif verdict.code in OUTCOMES and OUTCOMES[ExitCode(verdict.code)].next_step:
        print(OUTCOMES[ExitCode(verdict.code)].next_step, file=sys.stderr)
    if verdict.evidence:
        evidence = verdict.evidence
        print(f"evidence: {evidence.type} at {evidence.file}:{evidence.line}", file=sys.stderr)


def _samples(result: local.Result) -> list[dict[str, str]]:
    """The fixed prompts with the answers before and after, from samples.jsonl beside the weights."""
    if locations.parse(result.output.uri).scheme in ("oci", "hf"):
        return []
    try:
        lines = open_store(result.output, result.roots).read("samples.jsonl").decode().splitlines()
    except FileNotFoundError:
        return []
    found: dict[str, dict[str, str]] = {}
    for line in map(json.loads, lines):
        found.setdefault(line["prompt"], {"prompt": line["prompt"]})[line["when"]] = line["answer"]
    return list(found.values())


def _shown(place: Location, roots: Roots) -> str:
    """A path where there is one."""
    if locations.parse(place.uri).scheme in ("s3", "oci", "hf"):
        return place.uri
    return str(local_path(place, roots).resolve())


if __name__ == "__main__":
    sys.exit(main())
