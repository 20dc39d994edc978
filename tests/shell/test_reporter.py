"""The reporter against a real TLS server: what it sends, what it obeys, and that it never holds up training."""

import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.pki import Authority
from cluster.ports import free_port
from finetune_crds import names
from finetune_crds.progress import BODY_MAX, ProgressReport, RunReport
from finetune_crds.v1alpha1 import Checkpoint, CheckpointsStatus
from finetune_trainer.reporting.reporter import NullReporter, Reporter, open_reporter

PATH = "/v1alpha1/namespaces/ml/finetunejobs/bot/progress"
CONTINUE = (200, {"action": "continue"}, {})


class Server:
    """Answers POSTs as scripted, the last answer for ever, and keeps what came."""

    def __init__(self, authority: Authority, port: int = 0) -> None:
        self.answers: list[tuple[int, dict[str, Any], dict[str, str]]] = [CONTINUE]
        self.bodies: list[ProgressReport] = []
        self.tokens: list[str] = []
        self.times: list[float] = []
        self.connections = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                outer.connections += 1
                super().setup()

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == PATH
                outer.times.append(time.monotonic())
                outer.tokens.append(self.headers["Authorization"])
                outer.bodies.append(ProgressReport.model_validate_json(content))
                status, body, headers = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                encoded = json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(encoded))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(encoded)

            def log_message(self, *arguments: object) -> None:
                pass

        files = authority.issue("progress", names=["127.0.0.1"])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.certificate, files.key)
        self.httpd = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.httpd.daemon_threads = True
        self.httpd.socket = context.wrap_socket(self.httpd.socket, server_side=True)
        self.port = self.httpd.server_port
        self.thread = threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def wait(self, count: int, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while len(self.bodies) < count:
            assert time.monotonic() < deadline, f"{len(self.bodies)} of {count} reports came"
            time.sleep(0.01)

    def stop(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()
        self.thread.join()


@pytest.fixture
def server(authority: Authority) -> Iterator[Server]:
    started = Server(authority, free_port())
    yield started
    started.stop()


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("first\n")
    return file


def reporter(server: Server, authority: Authority, token: Path, interval: float = 0.3) -> Reporter:
    return Reporter(f"https://127.0.0.1:{server.port}{PATH}", token, authority.files.certificate, interval=interval)


def report(step: int, **changes: object) -> RunReport:
    return RunReport.model_validate({"attempt": 1, "stage": "Training", "step": step, "total_steps": 300, **changes})


def test_a_burst_of_steps_becomes_one_report_an_interval_with_the_newest_state(
    server: Server, authority: Authority, token: Path
) -> None:
    sender = reporter(server, authority, token, interval=0.3)
    sender.update(report(0), {})
    server.wait(1)  # a first handshake may take longer than all that follows
    began = time.monotonic()
    for step in range(1, 101):
        sender.update(report(step), {"loss": 2.0 / step})
        time.sleep(0.01)
    sender.close()
    seconds = time.monotonic() - began
    assert 3 <= len(server.bodies) <= 2 + seconds / 0.3, "the first, one an interval, and the last"
    last = server.bodies[-1]
    assert last.finetune == report(100)
    assert last.trainerStatus.progressPercentage == 33
    assert last.trainerStatus.estimatedRemainingSeconds is not None
    assert last.trainerStatus.estimatedRemainingSeconds <= 4 * seconds, "two thirds are left"
    assert {metric.name: metric.value for metric in last.trainerStatus.metrics} == {"loss": "0.02"}
    assert server.connections == 1
    assert set(server.tokens) == {"Bearer first"}


@pytest.mark.parametrize(
    "news",
    [
        {"stage": "Saving"},
        {"checkpoints": CheckpointsStatus(latest=Checkpoint(step=2, uri="pvc://m/c", digest="sha256:0", time="t"))},
        {"evaluation": {"before": [{"name": "eval_loss", "value": "2"}]}},
    ],
    ids=lambda news: next(iter(news)),
)
def test_what_somebody_waits_for_is_sent_at_once(
    server: Server, authority: Authority, token: Path, news: dict[str, object]
) -> None:
    sender = reporter(server, authority, token, interval=60)
    sender.update(report(1), {})
    server.wait(1)
    sender.update(report(2), {})
    time.sleep(0.3)
    assert len(server.bodies) == 1
    sender.update(report(2, **news), {})
    server.wait(2)


def test_a_rotated_token_is_read_again(server: Server, authority: Authority, token: Path) -> None:
    sender = reporter(server, authority, token, interval=0.01)
    sender.update(report(1), {})
    server.wait(1)
    token.write_text("second")
    sender.update(report(2), {})
    server.wait(2)
    assert server.tokens == ["Bearer first", "Bearer second"]


def test_stop_is_passed_on_with_its_reason(server: Server, authority: Authority, token: Path) -> None:
    server.answers = [(200, {"action": "stop", "reason": "Suspended"}, {})]
    sender = reporter(server, authority, token)
    assert sender.stop_requested is None
    sender.update(report(1), {})
    sender.close()
    assert sender.stop_requested == "Suspended"
    assert not sender.fenced


def test_409_fences_and_nothing_more_is_sent(server: Server, authority: Authority, token: Path) -> None:
    server.answers = [(409, {}, {})]
    sender = reporter(server, authority, token, interval=0.01)
    sender.update(report(1), {})
    deadline = time.monotonic() + 60
    while not sender.fenced:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    sender.update(report(2), {})
    sender.close()
    assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [429, 503, 500, 401, 403])
def test_a_refused_report_is_sent_again_after_the_pause_that_the_server_asks_for(
    server: Server, authority: Authority, token: Path, status: int
) -> None:
    server.answers = [(status, {}, {"Retry-After": "1"}), CONTINUE]
    sender = reporter(server, authority, token, interval=0.01)
    sender.update(report(7), {})
    server.wait(2)
    assert server.bodies[0] == server.bodies[1]
    assert server.times[1] - server.times[0] >= 0.9
    sender.close()


def test_a_body_that_will_never_be_taken_is_dropped(server: Server, authority: Authority, token: Path) -> None:
    server.answers = [(413, {}, {}), CONTINUE]
    sender = reporter(server, authority, token, interval=0.01)
    sender.update(report(1), {})
    server.wait(1)
    sender.update(report(2), {})
    server.wait(2)
    sender.close()
    assert [body.finetune.step for body in server.bodies if body.finetune] == [1, 2]


def test_a_server_that_is_away_and_comes_back_gets_the_newest_state(
    server: Server, authority: Authority, token: Path
) -> None:
    sender = reporter(server, authority, token, interval=0.01)
    sender.update(report(1), {})
    server.wait(1)
    server.stop()
    sender._connection.close()  # type: ignore[union-attr]  # the server's death does not reach its open connections here
    for step in range(2, 100):
        sender.update(report(step), {})
    time.sleep(0.3)
    back = Server(authority, port=server.port)
    back.wait(1)
    sender.close()
    back.stop()
    assert back.bodies[-1].finetune == report(99)


def test_a_server_that_never_answers_holds_up_neither_steps_nor_the_end(authority: Authority, token: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"https://127.0.0.1:{deaf.getsockname()[1]}{PATH}"
        sender = Reporter(url, token, authority.files.certificate, interval=0.01)
        for step in range(1000):  # none of them waits for an answer, and none ever comes
            sender.update(report(step), {"loss": 1.0})
        sender.close(timeout=0.5)


def test_a_server_of_another_authority_is_not_talked_to(
    server: Server, authority: Authority, token: Path, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other")
    other.create()
    sender = Reporter(f"https://127.0.0.1:{server.port}{PATH}", token, other.files.certificate, interval=0.01)
    sender.update(report(1), {})
    deadline = time.monotonic() + 30
    while not sender._failures:
        assert time.monotonic() < deadline, "it was not tried"
        time.sleep(0.01)
    sender.close(timeout=0)
    assert server.tokens == []


def test_a_proxy_of_the_environment_is_not_used(
    server: Server, authority: Authority, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    sender = reporter(server, authority, token)
    sender.update(report(1), {})
    sender.close()
    assert len(server.bodies) == 1


def test_metrics_that_make_the_body_too_long_are_left_out(server: Server, authority: Authority, token: Path) -> None:
    sender = reporter(server, authority, token)
    sender.update(report(1), {f"{i}-{'x' * 240}": 1.0 for i in range(256)})
    sender.close()
    (body,) = server.bodies
    assert body.finetune == report(1)
    assert len(body.model_dump_json()) < BODY_MAX


def test_values_that_are_not_finite_arrive(server: Server, authority: Authority, token: Path) -> None:
    sender = reporter(server, authority, token)
    sender.update(report(1), {"loss": float("nan")})
    sender.close()
    assert server.bodies[0].trainerStatus.metrics[0].value == "nan"


def test_without_the_environment_there_is_nobody_to_report_to(monkeypatch: pytest.MonkeyPatch, token: Path) -> None:
    for variable in (names.ENV_PROGRESS_URL, names.ENV_PROGRESS_TOKEN, names.ENV_PROGRESS_CA):
        monkeypatch.delenv(variable, raising=False)
    assert isinstance(open_reporter(), NullReporter)
    monkeypatch.setenv(names.ENV_PROGRESS_TOKEN, str(token))
    monkeypatch.setenv(names.ENV_PROGRESS_URL, "http://progress.example.com/x")
    assert isinstance(open_reporter(), NullReporter), "a token would be readable on the way"
    monkeypatch.setenv(names.ENV_PROGRESS_URL, "https://progress.example.com/x")
    assert isinstance(open_reporter(), Reporter)
