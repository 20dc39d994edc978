"""Progress on its way to the operator: one background thread, one POST an interval, and never a reason for training to wait or fail.

The contract is `finetune_crds.progress`. What comes back is the operator's word to the trainer: stop, or you are replaced.
http.client is used because it knows no proxies: the token must not travel through one.
"""

import http.client
import logging
import os
import ssl
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

from pydantic import ValidationError

from finetune_crds import names
from finetune_crds.progress import BODY_MAX, MetricReport, ProgressReply, ProgressReport, RunReport, TrainerStatus

ENV_INTERVAL: Final = "FINETUNE_REPORT_SECONDS"
"""Set by `finetune local`, whose bar moves faster than an operator would like."""
INTERVAL: Final = 5.0
_TIMEOUT = 10.0
_LONGEST_PAUSE = 60.0
_METRICS_MAX = 256

log = logging.getLogger("finetune.reporter")


class Progress(Protocol):
    """What the training loop sees of the reporter."""

    @property
    def stop_requested(self) -> str | None:
        """Why the operator wants this run to stop (Suspended, DeadlineExceeded), or None."""
        ...

    @property
    def fenced(self) -> bool:
        """Whether another run has taken this one's place: commit nothing more."""
        ...

    def update(self, report: RunReport, metrics: dict[str, float]) -> None:
        """Notes the state of the run. Returns at once."""
        ...

    def close(self, timeout: float = _TIMEOUT) -> None:
        """Sends what is noted, and ends. Waits at most `timeout` seconds."""
        ...


class NullReporter:
    """For a process that has nobody to report to."""

    stop_requested: str | None = None
    fenced = False

    def update(self, report: RunReport, metrics: dict[str, float]) -> None:
        """Nothing."""

    def close(self, timeout: float = _TIMEOUT) -> None:
        """Nothing."""


def open_reporter() -> Progress:
    """The reporter that the environment asks for: the three variables that transformers' KubeflowCallback reads, too."""
    url, token = os.environ.get(names.ENV_PROGRESS_URL), os.environ.get(names.ENV_PROGRESS_TOKEN)
    ca = os.environ.get(names.ENV_PROGRESS_CA)
    if not url or not token:
        return NullReporter()
    interval = float(os.environ.get(ENV_INTERVAL) or INTERVAL)
    try:
        return Reporter(url, Path(token), Path(ca) if ca else None, interval=interval)
    except ValueError as error:
        log.error("progress will not be reported (training goes on): %s", error)
        return NullReporter()


class Reporter:
    """Sends the newest state, at most once an interval; at once when a stage begins or a checkpoint or evaluation is new."""

    def __init__(self, url: str, token_file: Path, ca_file: Path | None, *, interval: float = INTERVAL) -> None:
        """Nothing is opened yet: the thread starts with the first update, so that a process may fork before.

        Raises:
            ValueError: the URL is not https; http is for this machine itself only, as the token would be readable.
        """
        parts = urlsplit(url)
        if parts.scheme != "https" and parts.hostname != "127.0.0.1":
            raise ValueError(f"{names.ENV_PROGRESS_URL} must start with https://, not {url}")
        self._https, self._host, self._port = parts.scheme == "https", parts.hostname or "", parts.port
        self._path = parts.path + (f"?{parts.query}" if parts.query else "")
        self._token_file, self._ca_file, self._interval = token_file, ca_file, interval
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pending: tuple[RunReport, dict[str, float], datetime] | None = None
        self._urgent = self._closing = False
        self._last: RunReport | None = None
        self._training_since: tuple[float, int] | None = None
        self._connection: http.client.HTTPConnection | None = None
        self._failures = 0
        self.stop_requested: str | None = None
        self.fenced = False

    def update(self, report: RunReport, metrics: dict[str, float]) -> None:
        """See Progress."""
        with self._changed:
            if self._closing or self.fenced:
                return
            self._urgent |= self._last is None or _is_news(self._last, report)
            self._last = report
            self._pending = (report, dict(metrics), datetime.now(UTC))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="finetune-reporter", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, timeout: float = _TIMEOUT) -> None:
        """See Progress."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout)

    def _work(self) -> None:
        due = 0.0
        while True:
            with self._changed:
                while not (self._pending and (self._urgent or self._closing or time.monotonic() >= due)):
                    if self._closing and not self._pending:
                        return
                    self._changed.wait(max(0.01, due - time.monotonic()) if self._pending else None)
                taken, self._pending, self._urgent = self._pending, None, False
            try:
                pause = self._post(self._body(*taken))
            except Exception as error:
                pause = self._failed(f"{type(error).__name__}: {error}")
            if self.fenced:
                return
            due = time.monotonic() + self._interval
            if pause is not None:
                with self._changed:
                    self._pending = self._pending or taken
                    if self._closing:
                        self._changed.wait(min(pause, 1.0))
                    else:
                        self._changed.wait_for(lambda: self._closing, pause)

    def _body(self, report: RunReport, metrics: dict[str, float], when: datetime) -> bytes:
        total = report.total_steps
        status = TrainerStatus(
            lastUpdatedTime=when.strftime("%Y-%m-%dT%H:%M:%SZ"),
            progressPercentage=min(100, 100 * report.step // total) if total else None,
            estimatedRemainingSeconds=self._remaining(report),
            metrics=[MetricReport(name=k, value=f"{v:.6g}") for k, v in list(metrics.items())[:_METRICS_MAX]],
        )
        body = ProgressReport(trainerStatus=status, finetune=report)
        encoded = body.model_dump_json(by_alias=True, exclude_none=True).encode()
        if len(encoded) > BODY_MAX:
            status.metrics = []
            encoded = body.model_dump_json(by_alias=True, exclude_none=True).encode()
        return encoded

    def _remaining(self, report: RunReport) -> int | None:
        """By the pace of this run's own steps so far."""
        if report.stage != "Training" and self._training_since is None:
            return None
        now = time.monotonic()
        if self._training_since is None:
            self._training_since = (now, report.step)
        since, first = self._training_since
        if report.step <= first:
            return None
        return max(0, round((report.total_steps - report.step) * (now - since) / (report.step - first)))

    def _post(self, body: bytes) -> float | None:
        """Sends once. Returns None when done with this body, else the pause before it may be tried again."""
        headers = {
            "Authorization": f"Bearer {self._token_file.read_text(encoding='utf-8').strip()}",
            "Content-Type": "application/json",
        }
        for is_last in (False, True):
            reused = self._connection is not None
            connection = self._connection or self._connect()
            try:
                connection.request("POST", self._path, body, headers)
                answer = connection.getresponse()
                content = answer.read(BODY_MAX)
                break
            except (http.client.HTTPException, OSError):
                connection.close()
                self._connection = None
                if is_last or not reused:  # a kept connection may have been closed meanwhile: that is no failure
                    raise
        if answer.will_close:
            self._connection = None
        return self._understand(answer, content)

    def _understand(self, answer: http.client.HTTPResponse, content: bytes) -> float | None:
        if answer.status == 200:
            if self._failures:
                log.info("progress is reported again")
            self._failures = 0
            try:
                reply = ProgressReply.model_validate_json(content)
            except ValidationError:
                return None
            if reply.action == "stop" and self.stop_requested is None:
                self.stop_requested = reply.reason or "Stopped"
            return None
        if answer.status == 409:
            log.error("another run has taken this one's place")
            self.fenced = True
            return None
        pause = self._failed(f"the server answered {answer.status}")
        if answer.status in (400, 413, 422):
            return None  # this body will never be taken; the next may
        wait = answer.headers.get("Retry-After", "")
        return min(_LONGEST_PAUSE, float(wait)) if wait.isdigit() else pause

    def _failed(self, why: str) -> float:
        """Notes a failure, in the log once a streak; returns the pause, doubled each time."""
        self._failures += 1
        if self._failures == 1:
            log.warning("progress cannot be reported (training goes on): %s", why)
        return float(min(_LONGEST_PAUSE, 2 ** (self._failures - 1)))

    def _connect(self) -> http.client.HTTPConnection:
        if self._https:
            # Read anew for each connection: the CA may have been renewed.
            context = ssl.create_default_context(cafile=self._ca_file)
            self._connection = http.client.HTTPSConnection(self._host, self._port, timeout=_TIMEOUT, context=context)
        else:
            self._connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT)
        return self._connection


def _is_news(before: RunReport, now: RunReport) -> bool:
    """What a user or the operator waits for."""
    return (
        before.stage != now.stage
        or before.checkpoints != now.checkpoints
        or before.evaluation != now.evaluation
        or before.inputs != now.inputs
    )
