"""What becomes of accepted reports: few writes, never backwards, by whichever replica; and the certificate that all share."""

import asyncio
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cluster.cluster import Cluster
from finetune_operator.cache import Cache
from finetune_operator.credentials import Credentials
from finetune_operator.kube import SECRETS, Kube, NotFound, Ref
from finetune_operator.progress_server import Certificates, ProgressServer
from finetune_operator.progress_server.certificates import UnusableSecret
from finetune_operator.progress_server.reviews import Reviews
from finetune_operator.progress_server.runs import Runs
from finetune_operator.progress_server.writer import ProgressWriter

from .jobs import FineTuneJob, eventually
from .operators import Operator
from .reporting import at, checkpoint, ours, progress_writes, reported, reporter, run_of, stock

SYSTEM = "finetune-system"


@pytest.fixture
async def kube(installed_cluster: Cluster) -> AsyncIterator[Kube]:
    """A client of this process, with an administrator's rights."""
    client = Kube(Credentials(str(installed_cluster.kubeconfig)))
    yield client
    await client.close()


class TestTwoReplicas:
    """A Service spreads the POSTs of one pod over two replicas."""

    @pytest.fixture(scope="class")
    def replicas(
        self, installed_cluster: Cluster, operator: Operator, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[tuple[Operator, Operator]]:
        log = tmp_path_factory.mktemp("replicas") / "standby"
        standby = Operator(installed_cluster, log, "operator-b", progress_host="127.0.0.1").start(wait=False)
        try:
            standby.wait_until(standby.stands_by)
            yield operator, standby
        finally:
            standby.stop()

    def test_any_replica_answers_and_status_never_goes_back(
        self, installed_cluster: Cluster, namespace: str, replicas: tuple[Operator, Operator]
    ) -> None:
        cluster = installed_cluster
        job = FineTuneJob("spread", namespace).holds().apply(cluster)
        first = reporter(cluster, job)
        second = at(first, replicas[1].progress_port)
        mark = cluster.audit.mark()
        # Checkpoints, so that each is written at once; late ones overtaken by the other replica among them.
        for client, step in (
            (first, 10),
            (second, 20),
            (first, 15),
            (second, 30),
            (first, 40),
            (second, 35),
            (first, 50),
        ):
            answer = client.post(ours(step, checkpoints={"latest": checkpoint(step)}))
            assert answer.code == 200, answer
        job.until(cluster, lambda s: s.get("progress", {}).get("step") == 50)

        def written() -> list[int]:
            return [status["progress"]["step"] for status in progress_writes(cluster, mark, job)]

        eventually(lambda: written()[-1:] == [50], "the audit log tells of it a moment later")
        writes, steps = progress_writes(cluster, mark, job), written()
        assert steps == sorted(steps)
        for write in writes:
            assert set(write) <= {"progress", "metrics", "checkpoints", "inputs", "evaluation"}

    def test_a_stock_script_ends_with_a_step_whichever_replica_hears_of_its_end(
        self, installed_cluster: Cluster, namespace: str, replicas: tuple[Operator, Operator]
    ) -> None:
        """It tells a step in the middle only; each of its POSTs is a connection of its own."""
        cluster = installed_cluster
        job = FineTuneJob("stock", namespace).holds().apply(cluster)
        first = reporter(cluster, job)
        assert first.post(stock(0, total_steps=30)).code == 200
        job.until(cluster, lambda s: s.get("progress", {}).get("percentage") == 0)
        assert first.post(stock(56, total_steps=30, current_step=17, loss=2)).code == 200
        job.until(cluster, lambda s: s["progress"].get("step") == 17, seconds=15)  # not after 30 s
        assert at(first, replicas[1].progress_port).post(stock(100, loss=1)).code == 200
        ended = job.until(cluster, lambda s: s["progress"]["percentage"] == 100)
        assert (ended["progress"]["step"], ended["progress"]["totalSteps"]) == (17, 30)
        assert ended["metrics"] == [{"name": "loss", "value": "1"}]

    def test_both_present_the_same_ca_and_only_the_leader_exports_jobs(
        self, installed_cluster: Cluster, namespace: str, replicas: tuple[Operator, Operator]
    ) -> None:
        cluster = installed_cluster
        client = reporter(cluster, FineTuneJob("seen", namespace).holds().apply(cluster))
        assert client.post(ours(1)).code == at(client, replicas[1].progress_port).post(ours(2)).code == 200
        series = 'finetune_jobs{method="lora",namespace="' + namespace + '",phase="Running"}'
        replicas[0].wait_until(lambda: replicas[0].metric(series) == 1.0)
        with pytest.raises(StopIteration):
            replicas[1].metric(series)

    def test_what_was_accepted_is_written_before_a_replica_ends(
        self, installed_cluster: Cluster, namespace: str, replicas: tuple[Operator, Operator], log_folder: Any
    ) -> None:
        cluster = installed_cluster
        third = Operator(cluster, log_folder / "c", "operator-c", progress_host="127.0.0.1").start(wait=False)
        try:
            third.wait_until(third.stands_by)
            job = FineTuneJob("pending", namespace).holds().apply(cluster)
            client = at(reporter(cluster, job), third.progress_port)
            assert client.post(ours(1)).code == 200
            job.until(cluster, lambda s: s.get("progress", {}).get("step") == 1)
            third.wait_until(lambda: third.metric("finetune_job_start_seconds_count") == 1)
            assert client.post(ours(2)).code == 200
            assert job.status(cluster)["progress"]["step"] == 1, "kept back for the rest of its 30 s"
        finally:
            code = third.stop()
        assert code == 0
        assert job.status(cluster)["progress"]["step"] == 2


@pytest.mark.usefixtures("operator")
class TestCoalescing:
    """The writer by itself, with an interval of two seconds in place of thirty."""

    async def test_one_write_an_interval_and_at_once_what_must_not_wait(
        self, installed_cluster: Cluster, namespace: str, kube: Kube
    ) -> None:
        cluster = installed_cluster
        job = FineTuneJob("busy", namespace).holds().apply(cluster)
        run = await run_of(cluster, job)
        writer = ProgressWriter(kube, Cache(), interval_seconds=2)
        mark, began = cluster.audit.mark(), time.monotonic()
        for step in range(1, 31):  # three seconds of a report each 0.1 s, a checkpoint in the middle
            extra = {"checkpoints": {"latest": checkpoint(15)}} if step == 15 else {}
            writer.submit(reported(run, ours(step, **extra)))
            await asyncio.sleep(0.1)
        seconds = time.monotonic() - began
        await asyncio.to_thread(job.until, cluster, lambda s: s["progress"]["step"] == 30, 20)
        await writer.close()
        writes = progress_writes(cluster, mark, job)
        steps = [status["progress"]["step"] for status in writes]
        assert steps[0] == 1, "the first at once"
        told = [step for step, write in zip(steps, writes, strict=True) if write.get("checkpoints")]
        assert told[0] <= 20, "a checkpoint at once"
        assert steps[-1] == 30, "the last is not lost"
        assert len(steps) <= 3 + seconds / 2, "one an interval, the checkpoint, and the last"
        assert writes[-1]["checkpoints"] == {"latest": checkpoint(15)}, "what an apply omits would be deleted"

    async def test_a_job_made_again_meanwhile_is_not_written_to(
        self, installed_cluster: Cluster, namespace: str, kube: Kube
    ) -> None:
        """Apply is an upsert: without the UID it would write the progress of one object into another."""
        cluster = installed_cluster
        job = FineTuneJob("twice", namespace).holds().apply(cluster)
        run = await run_of(cluster, job)
        job.delete(cluster)
        job.apply(cluster)
        await asyncio.to_thread(job.wait, cluster, "Running")
        writer = ProgressWriter(kube, Cache(), interval_seconds=1)
        writer.submit(reported(run, ours(7)))
        await writer.close()
        assert "progress" not in job.status(cluster)


class TestCertificates:
    """The Secret in a real API server, and listeners that present what it holds."""

    @pytest.fixture
    def secret(self, installed_cluster: Cluster) -> Iterator[str]:
        name = f"certificates-{secrets.token_hex(3)}"
        yield name
        installed_cluster.kubectl("delete", "secret", name, "-n", SYSTEM, "--ignore-not-found")

    async def test_replicas_that_start_together_serve_under_one_ca(
        self, installed_cluster: Cluster, kube: Kube, secret: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        all_have_looked = asyncio.Barrier(8)
        get = kube.get

        async def look(ref: Ref) -> dict[str, Any]:
            try:
                return await get(ref)
            except NotFound:
                await all_have_looked.wait()
                raise

        monkeypatch.setattr(kube, "get", look)
        mark = installed_cluster.audit.mark()
        replicas = [Certificates(kube, SYSTEM, secret, ["127.0.0.1"]) for _ in range(8)]
        await asyncio.gather(*(replica.load() for replica in replicas))
        assert len({replica.ca_pem() for replica in replicas}) == 1
        created = installed_cluster.audit.since(mark, verb="create", resource="secrets", namespace=SYSTEM)
        assert sorted(event.code for event in created) == [201] + [409] * 7

    async def test_a_renewed_leaf_is_served_without_a_restart_and_the_ca_stays(self, kube: Kube, secret: str) -> None:
        now = datetime.now(UTC) - timedelta(days=30)
        certificates = Certificates(kube, SYSTEM, secret, ["127.0.0.1"], now=lambda: now)
        await certificates.load()
        ca = certificates.ca_pem()
        server = ProgressServer(certificates, Reviews(kube), Runs(kube, Cache()), ProgressWriter(kube, Cache()))
        port = await server.start("127.0.0.1", 0)
        try:
            old = await _served(port, ca)
            now += timedelta(days=29)
            await certificates.load()
            assert await _served(port, ca) == old
            now += timedelta(days=1)
            await certificates.load()
            new = await _served(port, ca)
            assert new != old
            assert certificates.ca_pem() == ca
            follower = Certificates(kube, SYSTEM, secret, ["127.0.0.1"], now=lambda: now)
            await follower.load()
            assert follower.ca_pem() == ca
        finally:
            await server.stop()

    async def test_idle_connections_neither_stay_nor_pile_up(self, kube: Kube, secret: str) -> None:
        certificates = Certificates(kube, SYSTEM, secret, ["127.0.0.1"])
        await certificates.load()
        parts = certificates, Reviews(kube), Runs(kube, Cache()), ProgressWriter(kube, Cache())
        server = ProgressServer(*parts, connection_seconds=10.0, connections_max=3)
        port = await server.start("127.0.0.1", 0)
        context = ssl.create_default_context(cadata=certificates.ca_pem())
        try:
            streams = [await asyncio.open_connection("127.0.0.1", port, ssl=context) for _ in range(4)]
            ends = [asyncio.create_task(reader.read()) for reader, _ in streams]
            done, idle = await asyncio.wait(ends, timeout=30, return_when=asyncio.FIRST_COMPLETED)
            assert (done, len(idle)) == ({ends[3]}, 3), "the fourth is one too many"
            _, idle = await asyncio.wait(ends, timeout=30)
            assert not idle, "the others were closed after their ten seconds"
            await _served(port, certificates.ca_pem())
            for _, writer in streams:
                writer.close()
        finally:
            await server.stop()

    async def test_a_secret_of_somebody_else_is_left_alone(self, kube: Kube, secret: str) -> None:
        data = {"password": "c2VjcmV0"}
        body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": secret}, "data": data}
        await kube.create(SECRETS(SYSTEM), body)
        with pytest.raises(UnusableSecret, match=f"Secret {SYSTEM}/{secret} does not hold ca.crt"):
            await Certificates(kube, SYSTEM, secret, ["127.0.0.1"]).load()
        assert (await kube.get(SECRETS(SYSTEM, secret)))["data"] == data


async def _served(port: int, ca: str) -> bytes:
    """The certificate presented to a client that trusts `ca`."""
    context = ssl.create_default_context(cadata=ca)
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="127.0.0.1")
    certificate: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    await writer.wait_closed()
    return certificate
