"""A live progress bar for one FineTuneJob, from its status."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .target import Target, TargetError

POLL_SECONDS = 2.0


def follow(console: Console, target: Target, namespace: str, name: str) -> None:
    """Shows progress until the job has ended.

    Raises:
        TargetError: the job failed; the message is its failure as status tells it.
    """
    columns = (
        TextColumn("      {task.description}"),
        BarColumn(40),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=100, detail="")
        while True:
            status = target.get("finetunejob", name, "-n", namespace).get("status", {})
            holding = {c["type"]: c for c in status.get("conditions", []) if c["status"] == "True"}
            _draw(bar, task, status, holding)
            if "Complete" in holding:
                bar.update(task, completed=100)
                return
            if "Failed" in holding:
                failure = status.get("failure", {})
                raise TargetError(
                    f"the job failed: {failure.get('message', holding['Failed']['message'])} {failure.get('nextStep', '')}"
                )
            time.sleep(POLL_SECONDS)


def _draw(bar: Progress, task: TaskID, status: dict[str, Any], holding: dict[str, Any]) -> None:
    progress = status.get("progress", {})
    metrics = {m["name"]: m["value"] for m in status.get("metrics", [])}
    detail = progress.get("display", "")
    if "loss" in metrics:
        detail += f"  loss {metrics['loss']}"
    if "eval_loss" in metrics:
        detail += f"  held-out {metrics['eval_loss']}"
    if progress.get("tokensPerSecond"):
        detail += f"  {progress['tokensPerSecond']} tokens/s"
    if "Waiting" in holding:
        detail = holding["Waiting"]["message"]
    bar.update(
        task,
        description=str(progress.get("stage") or status.get("phase") or "starting").lower(),
        completed=progress.get("percentage", 0),
        detail=detail,
    )
