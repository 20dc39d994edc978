"""What a scrape gives: valid exposition, bounded series, and none of a job that has ended."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from finetune_operator.metrics import Metrics, MetricsServer
from finetune_operator.views import FineTuneJobView, finetunejob_view


def job(name: str, phase: str = "Running", *, spec: dict[str, Any] | None = None, **status: Any) -> FineTuneJobView:
    conditions = {"Complete": "Complete", "Failed": "Failed"}
    status |= {"phase": phase}
    if phase in conditions:
        status["conditions"] = [{"type": phase, "status": "True", "reason": phase, "message": ""}]
    metadata = {
        "namespace": "team",
        "name": name,
        "uid": f"uid-{name}",
        "resourceVersion": "1",
        "generation": 1,
        "creationTimestamp": "2026-01-31T12:00:00Z",
    }
    return finetunejob_view({"metadata": metadata, "spec": spec or {}, "status": status})


def running(name: str, **more: Any) -> FineTuneJobView:
    progress = {"percentage": 40, "step": 120, "tokensPerSecond": 5000}
    return job(name, progress=progress, metrics=[{"name": "loss", "value": "1.25"}], **more)


def scrape(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels, through the parser of the exposition format."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, f"{key} is exposed twice"
            found[key] = sample.value
    return found


def of_jobs(jobs: Iterable[FineTuneJobView], *, leader: bool = True) -> dict[str, dict[tuple[str, ...], float]]:
    """Samples about jobs: name -> label values -> value."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for (name, labels), value in scrape(Metrics(lambda: jobs, is_leader=lambda: leader)).items():
        if name.startswith("finetune_job"):
            found.setdefault(name, {})[tuple(value for _, value in labels)] = value
    return {
        name: series for name, series in found.items() if not name.endswith(("_bucket", "_sum", "_count", "_created"))
    }


def test_jobs_by_phase_method_and_namespace() -> None:
    jobs = [running("a"), running("b", spec={"method": {"full": {}}}), job("c", "Waiting"), job("d", "Complete")]
    assert of_jobs(jobs)["finetune_jobs"] == {
        ("lora", "team", "Running"): 1,
        ("full", "team", "Running"): 1,
        ("lora", "team", "Waiting"): 1,
        ("lora", "team", "Complete"): 1,
    }


def test_running_jobs_have_series_of_their_own_until_they_end() -> None:
    found = of_jobs([running("a")])
    assert found["finetune_job_progress_ratio"] == {("a", "team"): 0.4}
    assert found["finetune_job_loss"] == {("a", "team"): 1.25}
    assert found["finetune_job_tokens_per_second"] == {("a", "team"): 5000}
    progress = {"percentage": 100, "tokensPerSecond": 5000}
    for phase in ("Complete", "Failed", "Suspended"):
        ended = of_jobs([job("a", phase, progress=progress, metrics=[{"name": "loss", "value": "1"}])])
        assert set(ended) == {"finetune_jobs"}, phase


def test_ten_thousand_finished_jobs_add_no_series() -> None:
    few, many = ([job(f"job-{i}", "Complete") for i in range(count)] for count in (1, 10_000))
    assert len(scrape(Metrics(lambda: few))) == len(scrape(Metrics(lambda: many)))


def test_only_the_leader_exports_jobs() -> None:
    assert of_jobs([running("a")], leader=False) == {}
    series = scrape(Metrics(is_leader=lambda: False))
    assert series["finetune_leader", ()] == 0


def test_diverged_loss_is_exposed_as_such() -> None:
    found = of_jobs([job("a", metrics=[{"name": "loss", "value": "nan"}])])
    (value,) = found["finetune_job_loss"].values()
    assert value != value


def test_instruments_of_the_parts() -> None:
    metrics = Metrics(queue_depth=lambda: 7)
    metrics.count_progress_post(429)
    metrics.count_api_request("patch", "finetunejobs", 409, 0.004)
    metrics.attempts.labels(cause="Disruption").inc()
    metrics.gpu_seconds.labels(outcome="Finished").inc(3600)
    metrics.queue_seconds.observe(12)
    found = scrape(metrics)
    assert found["finetune_progress_posts_total", (("code", "429"),)] == 1
    assert found["finetune_api_requests_total", (("code", "409"), ("resource", "finetunejobs"), ("verb", "patch"))] == 1
    assert found["finetune_attempts_total", (("cause", "Disruption"),)] == 1
    assert found["finetune_gpu_seconds_total", (("outcome", "Finished"),)] == 3600
    assert found["finetune_job_queue_seconds_bucket", (("le", "15.0"),)] == 1
    assert found["finetune_job_queue_seconds_bucket", (("le", "5.0"),)] == 0
    assert found["finetune_queue_depth", ()] == 7
    assert found["finetune_leader", ()] == 1


def test_every_series_has_our_prefix_or_that_of_the_process() -> None:
    for name, _ in scrape(Metrics(lambda: [running("a")])):
        assert name.startswith(("finetune_", "process_", "python_"))


def test_every_metric_is_in_the_operations_page() -> None:
    page = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    for family in Metrics().registry.collect():
        if family.name.startswith("finetune_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            assert f"`{name}`" in page, name


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
async def test_served_over_http(accept: str) -> None:
    healthy = True
    server = MetricsServer(Metrics(lambda: [running("a")]), is_healthy=lambda: healthy)
    port = await server.start("127.0.0.1", 0)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with session.get("/metrics", headers={"Accept": accept}) as answer:
                assert answer.status == 200
                assert answer.headers["Content-Type"].startswith(accept.partition(";")[0])
                assert 'finetune_job_loss{name="a",namespace="team"} 1.25' in (await answer.text())
            async with session.get("/healthz") as answer:
                assert answer.status == 200
            healthy = False
            async with session.get("/healthz") as answer:
                assert answer.status == 503
    finally:
        await server.stop()
