"""What Prometheus scrapes. One `Metrics` a process: the operator's parts call its instruments, the jobs are read at each scrape.

No label holds free text: namespace and name of running jobs only (their series go with the end), phase, method, cause, outcome,
verb, resource and code, each from a closed set. Gauges of single jobs come from the leader alone, so that a sum is right.
"""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Final, NamedTuple

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, PlatformCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from .figures import decimal
from .views import FineTuneJobView, Json

_MINUTES: Final = (1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400, 172800, 604800)
"""Upper bounds in seconds for what takes from seconds to days."""
_MILLISECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15)


class JobSample(NamedTuple):
    """What a scrape tells about one FineTuneJob."""

    namespace: str
    name: str
    phase: str
    method: str
    progress: float | None = None
    """0 to 1; this and the next two of running jobs only."""
    loss: float | None = None
    tokens_per_second: float | None = None


def sample(view: FineTuneJobView) -> JobSample:
    """A job's sample from what the watch has seen."""
    found = JobSample(view.namespace, view.name, view.phase, view.method)
    document = None if view.finished or view.phase != "Running" else view.document()
    if document is None:
        return found
    status: Json = document.get("status") or {}
    progress: Json = status.get("progress") or {}
    percentage, rate = progress.get("percentage"), progress.get("tokensPerSecond")
    losses = [decimal(metric["value"]) for metric in status.get("metrics") or () if metric["name"] == "loss"]
    return found._replace(
        progress=None if percentage is None else percentage / 100,
        loss=float(losses[0]) if losses and losses[0] else None,
        tokens_per_second=None if rate is None else float(rate),
    )


class Metrics:
    """The instruments of one process and the registry that they are in."""

    def __init__(
        self,
        jobs: Callable[[], Iterable[FineTuneJobView]] = tuple,
        *,
        is_leader: Callable[[], bool] = lambda: True,
        queue_depth: Callable[[], int] = lambda: 0,
    ) -> None:
        """
        Args:
            jobs: every FineTuneJob that the watches have seen; read at each scrape.
            is_leader: whether this process reconciles; only then are jobs exported.
            queue_depth: keys that wait for a reconcile worker.
        """
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        registry.register(_Jobs(jobs, is_leader))
        self.queue_seconds = Histogram(
            "finetune_job_queue_seconds",
            "From creation until all training pods run, a preflight included.",
            buckets=_MINUTES,
            registry=registry,
        )
        self.start_seconds = Histogram(
            "finetune_job_start_seconds",
            "From the start of the training container to its first report.",
            buckets=_MINUTES,
            registry=registry,
        )
        self.train_seconds = Histogram(
            "finetune_job_train_seconds",
            "From the first running pod to the end, by result.",
            ["result"],
            buckets=_MINUTES,
            registry=registry,
        )
        self.gpu_seconds = Counter(
            "finetune_gpu_seconds", "GPU-seconds of ended attempts, by outcome.", ["outcome"], registry=registry
        )
        self.attempts = Counter(
            "finetune_attempts",
            "Runs and attempts that ended, by cause; Finished for those that did.",
            ["cause"],
            registry=registry,
        )
        self.preflight_seconds = Histogram(
            "finetune_preflight_seconds",
            "From the start of a preflight's pod to its end, by result: Passed or Failed. No GPU is held meanwhile.",
            ["result"],
            buckets=_MINUTES,
            registry=registry,
        )
        self.reconcile_seconds = Histogram(
            "finetune_reconcile_seconds", "One pass over one job.", buckets=_MILLISECONDS, registry=registry
        )
        self.reconcile_errors = Counter(
            "finetune_reconcile_errors",
            "Passes that failed and are tried again, by error.",
            ["error"],
            registry=registry,
        )
        self.progress_posts = Counter(
            "finetune_progress_posts", "Answers to reports of trainers, by HTTP code.", ["code"], registry=registry
        )
        self.api_requests = Counter(
            "finetune_api_requests",
            "Requests to the API server; code 0 had no answer.",
            ["verb", "resource", "code"],
            registry=registry,
        )
        self.api_seconds = Histogram(
            "finetune_api_request_seconds",
            "How long the API server took.",
            ["verb"],
            buckets=_MILLISECONDS,
            registry=registry,
        )
        self._of_api = cache(
            lambda verb, resource, code: (
                self.api_requests.labels(verb, resource, str(code)),
                self.api_seconds.labels(verb),
            )
        )
        depth = Gauge("finetune_queue_depth", "Jobs that wait for a reconcile pass.", registry=registry)
        depth.set_function(queue_depth)
        leader = Gauge("finetune_leader", "1 in the replica that reconciles.", registry=registry)
        leader.set_function(is_leader)

    def count_progress_post(self, code: int) -> None:
        """Counts an answer of the progress server."""
        self.progress_posts.labels(code=str(code)).inc()

    def count_api_request(self, verb: str, resource: str, code: int, seconds: float) -> None:
        """Counts a request to the API server; the observer of `kube.Kube`."""
        requests, times = self._of_api(verb, resource, code)
        requests.inc()
        times.observe(seconds)


class _Jobs(Collector):
    def __init__(self, jobs: Callable[[], Iterable[FineTuneJobView]], is_leader: Callable[[], bool]) -> None:
        self._jobs = jobs
        self._is_leader = is_leader

    def collect(self) -> Iterator[Metric]:
        counts = GaugeMetricFamily("finetune_jobs", "FineTuneJobs that exist.", labels=("namespace", "method", "phase"))
        progress, loss, rate = (
            GaugeMetricFamily(name, doc, labels=("namespace", "name"))
            for name, doc in (
                ("finetune_job_progress_ratio", "Share of the work done of a running job."),
                ("finetune_job_loss", "Latest training loss of a running job."),
                ("finetune_job_tokens_per_second", "Non-padding input tokens a second of a running job."),
            )
        )
        samples = [sample(view) for view in self._jobs()] if self._is_leader() else []
        tally = Tally((job.namespace, job.method, job.phase) for job in samples)
        for labels, count in sorted(tally.items()):
            counts.add_metric(labels, count)
        for job in samples:
            for family, value in ((progress, job.progress), (loss, job.loss), (rate, job.tokens_per_second)):
                if value is not None:
                    family.add_metric((job.namespace, job.name), value)
        yield from (counts, progress, loss, rate)

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing is read when it is registered


class MetricsServer:
    """Plain HTTP: /metrics for Prometheus, /healthz for the kubelet."""

    def __init__(self, metrics: Metrics, *, is_healthy: Callable[[], bool] = lambda: True) -> None:
        self._metrics = metrics
        self._is_healthy = is_healthy
        self._runner: web.AppRunner | None = None

    async def start(self, host: str | None, port: int) -> int:
        """Listens; the port, chosen by the system when 0 is given."""
        application = web.Application()
        application.router.add_get("/metrics", self._scrape)
        application.router.add_get("/healthz", self._health)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        bound: int = self._runner.addresses[0][1]
        return bound

    async def stop(self) -> None:
        """Stops listening."""
        if self._runner:
            await self._runner.cleanup()

    async def _scrape(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._metrics.registry), headers={"Content-Type": content_type})

    async def _health(self, request: web.Request) -> web.Response:
        healthy = self._is_healthy()
        return web.Response(text="ok" if healthy else "unhealthy", status=200 if healthy else 503)
