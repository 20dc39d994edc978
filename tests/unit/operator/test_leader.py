"""The election by itself, against an API server that is slow, away, or answers too late. Two replicas at a real one: tests/api."""

import asyncio
from typing import Any

import pytest

from finetune_operator.kube import Conflict, NotFound, Unreachable
from finetune_operator.leader import Leader
from finetune_operator.settings import Settings

SETTINGS = Settings(identity="one", retry_period=0.02, renew_deadline=0.2, lease_seconds=1)


class Leases:
    """One Lease, and what becomes of the next writes: each a word, `as it should` when none is left."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.fates: list[str] = []
        self.writes = 0

    async def get(self, ref: object) -> dict[str, Any]:
        if self.lease is None:
            raise NotFound(404, {}, None, "GET")
        return self.lease

    async def create(self, ref: object, body: dict[str, Any]) -> dict[str, Any]:
        return self._kept(body)

    async def update(self, ref: object, body: dict[str, Any]) -> dict[str, Any]:
        fate = self.fates.pop(0) if self.fates else "as it should"
        if fate == "hangs":
            await asyncio.sleep(3600)
        if fate == "is away":
            raise Unreachable("away")
        if self.lease is None or body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise Conflict(409, {}, None, "PUT")
        kept = self._kept(body)
        if fate == "answer is lost":
            raise Unreachable("no answer")
        return kept

    def taken_by(self, other: str) -> None:
        assert self.lease is not None
        self._kept({**self.lease, "spec": {**self.lease["spec"], "holderIdentity": other}})

    def _kept(self, body: dict[str, Any]) -> dict[str, Any]:
        self.writes += 1
        self.lease = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.writes)}}
        return self.lease


class Election:
    """One replica that has been elected."""

    def __init__(self) -> None:
        self.leases = Leases()
        self.elected = asyncio.Event()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        leader = Leader(
            self.leases,  # type: ignore[arg-type]
            SETTINGS,
            elected=self.elected.set,
            lost=self.lost.set_result,
        )
        self.task = asyncio.create_task(leader.run())

    async def renewed(self, times: int) -> None:
        """Waits for more writes of the Lease."""
        wanted = self.leases.writes + times
        while self.leases.writes < wanted:
            assert not self.lost.done()
            await asyncio.sleep(0.005)


@pytest.fixture
async def election() -> Election:
    made = Election()
    await made.elected.wait()
    return made


async def test_a_renewal_that_hangs_ends_with_the_deadline(election: Election) -> None:
    election.leases.fates = ["hangs"]
    assert "could not be renewed" in await asyncio.wait_for(election.lost, 30)


async def test_an_answer_that_was_lost_is_not_taken_for_another_leader(election: Election) -> None:
    election.leases.fates = ["answer is lost"]
    await election.renewed(3)
    assert not election.lost.done()
    election.task.cancel()


async def test_what_the_lost_answer_leaves_to_do_ends_with_the_deadline_too(election: Election) -> None:
    election.leases.fates = ["answer is lost", "as it should", "hangs"]
    assert "could not be renewed" in await asyncio.wait_for(election.lost, 30)


async def test_a_short_absence_is_waited_out(election: Election) -> None:
    election.leases.fates = ["is away", "is away"]
    await election.renewed(2)
    election.task.cancel()


async def test_a_lease_that_another_has_taken_ends_it(election: Election) -> None:
    election.leases.taken_by("two")
    assert "another replica" in await asyncio.wait_for(election.lost, 30)
