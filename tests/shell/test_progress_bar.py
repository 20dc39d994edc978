"""The reports of the real reporter, as a terminal and as a log show them."""

import io
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from rich.console import Console

from finetune_crds.progress import ProgressReport, RunReport
from finetune_trainer.local.progress_bar import ProgressServer, Screen, numbers
from finetune_trainer.reporting.reporter import Reporter


def reported(**changes: object) -> ProgressReport:
    status = {
        "estimatedRemainingSeconds": 125,
        "metrics": [{"name": "loss", "value": "1.23456"}, {"name": "grad_norm", "value": "3"}],
    }
    run = {"attempt": 1, "stage": "Training", "step": 4, "total_steps": 10, "tokens_per_second": 120, **changes}
    return ProgressReport.model_validate({"trainerStatus": status, "finetune": RunReport.model_validate(run)})


def test_numbers_are_those_that_a_user_watches() -> None:
    assert numbers(reported()) == "loss 1.235  120 tokens/s  2:05 left"


def test_a_log_gets_a_line_a_stage_and_a_tenth() -> None:
    out = io.StringIO()
    screen = Screen(Console(file=out, force_terminal=False, width=60))
    for step in range(41):
        screen.take(reported(step=step, total_steps=40))
        screen.refresh()
    screen.take(reported(stage="Publishing", step=40, total_steps=40))
    screen.refresh()
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        *[f"Training {step}/40" for step in range(0, 41, 4)],
        "Publishing 40/40",
    ]


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    screen = Screen(Console(file=out, force_terminal=True, width=100))
    screen.take(reported())
    screen.refresh()
    screen.clear()
    for word in ("Training", "4/10", "loss 1.235", "120 tokens/s"):
        assert word in out.getvalue()


def test_the_trainers_reports_arrive_and_nobody_elses(tmp_path: Path) -> None:
    out = io.StringIO()
    screen = Screen(Console(file=out, force_terminal=False, width=60))
    with ProgressServer(screen) as server:
        token = tmp_path / "token"
        token.write_text(server.token)
        sender = Reporter(server.url, token, None, interval=0.01)
        sender.update(RunReport(attempt=1, stage="Loading", step=0, total_steps=0), {})
        sender.close()
        forged = urllib.request.Request(server.url, b"{}", {"Authorization": "Bearer x"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            opener.open(forged, timeout=5)
        refused.value.close()
    screen.refresh()
    assert out.getvalue() == "Loading\n"
    assert sender.stop_requested is None
