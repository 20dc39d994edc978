"""What `finetune local` shows: a server on loopback that takes the trainer's reports, and a bar that draws the newest one."""

import hmac
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from finetune_crds.progress import BODY_MAX, PATH, ProgressReply, ProgressReport

_LINES: Final = 10
"""Where there is no terminal: lines a training."""


class Screen:
    """The terminal, or a log. Reports come from another thread and are drawn by refresh."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._newest: ProgressReport | None = None
        self._drawn = ("", -1)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.fields[of]}"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("Starting", total=None, of="?", numbers="")

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def take(self, report: ProgressReport) -> None:
        """Notes the newest report."""
        self._newest = report

    def refresh(self) -> None:
        """Draws the newest report."""
        if self.console.is_terminal:
            self._bar.start()
        report = self._newest
        if report is None or report.finetune is None:
            return
        run = report.finetune
        if self.console.is_terminal:
            self._bar.update(
                self._task,
                description=run.stage,
                total=run.total_steps or None,
                completed=run.step,
                of=run.total_steps or "?",
                numbers=numbers(report),
            )
            return
        tenth = _LINES * run.step // run.total_steps if run.total_steps else 0
        if (run.stage, tenth) != self._drawn:
            self._drawn = (run.stage, tenth)
            done = f" {run.step}/{run.total_steps}" if run.total_steps else ""
            self.say(f"{run.stage}{done}  {numbers(report)}".rstrip())

    def clear(self) -> None:
        """Removes the bar."""
        self._bar.stop()


def numbers(report: ProgressReport) -> str:
    """Loss, speed and time left, as far as they are known."""
    values = {metric.name: metric.value for metric in report.trainerStatus.metrics}
    parts = [f"{name} {float(values[name]):.3f}" for name in ("loss", "eval_loss") if name in values]
    if report.finetune and report.finetune.tokens_per_second:
        parts.append(f"{report.finetune.tokens_per_second} tokens/s")
    left = report.trainerStatus.estimatedRemainingSeconds
    if left:
        parts.append(f"{left // 60}:{left % 60:02d} left")
    return "  ".join(parts)


class ProgressServer:
    """The operator's side of the progress contract, as much of it as one job on one machine needs."""

    def __init__(self, screen: Screen) -> None:
        self.token = secrets.token_urlsafe(24)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(min(length, BODY_MAX))
                given = self.headers.get("Authorization") or ""
                if not hmac.compare_digest(given, f"Bearer {outer.token}"):
                    self.answer(401, b"")
                    return
                try:
                    screen.take(ProgressReport.model_validate_json(body))
                except ValidationError:
                    self.answer(400, b"")
                    return
                self.answer(200, ProgressReply(action="continue").model_dump_json(exclude_none=True).encode())

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Nothing: the terminal belongs to the bar."""

        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._httpd.daemon_threads = True
        path = PATH.format(namespace="local", name="local")
        self.url = f"http://127.0.0.1:{self._httpd.server_port}{path}"

    def __enter__(self) -> "ProgressServer":
        threading.Thread(target=self._httpd.serve_forever, name="progress-server", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
