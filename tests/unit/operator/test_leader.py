"""The election by itself, against an API server that is slow, away, or answers too late. Two replicas at a real one: tests/api."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from finetune_operator.kube import Conflict, NotFound, Unreachable
from finetune_operator.leader import Leader
from finetune_operator.settings import Settings

PATIENT = Settings(identity="one", retry_period=0.02, renew_deadline=30, lease_seconds=60)
"""A machine that does something else for a while does not make it end."""
HASTY = Settings(identity="one", retry_period=0.02, renew_deadline=0.2, lease_seconds=1)


class Leases:
    """One Lease, and what becomes of the next writes: each a word, `as it should` when none is left."""

    def __init__(self, fates: Sequence[str]) -> None:
        self.lease: dict[str, Any] | None = None
        self.fates = list(fates)
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
    """One replica that stands for election."""

    def __init__(self, settings: Settings, fates: Sequence[str] = ()) -> None:
        self.leases = Leases(fates)
        self.elected = asyncio.Event()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        leader = Leader(
            self.leases,  # type: ignore[arg-type]
            settings,
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


@pytest.mark.parametrize("fates", [["hangs"], ["answer is lost", "as it should", "hangs"]])
async def test_a_renewal_that_hangs_ends_with_the_deadline(fates: list[str]) -> None:
    election = Election(HASTY, fates)
    assert "could not be renewed" in await asyncio.wait_for(election.lost, 30)


@pytest.mark.parametrize("fates", [["answer is lost"], ["is away", "is away"]])
async def test_a_lost_answer_and_a_short_absence_are_waited_out(fates: list[str]) -> None:
    election = Election(PATIENT, fates)
    await election.renewed(3)
    assert not election.lost.done()
    election.task.cancel()


async def test_a_lease_that_another_has_taken_ends_it() -> None:
    election = Election(PATIENT)
    await election.elected.wait()
    election.leases.taken_by("two")
    assert "another replica" in await asyncio.wait_for(election.lost, 30)
