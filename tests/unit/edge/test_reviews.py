"""Tokens that could not pass a review are told apart without one. What the API server says of them: tests/api."""

import base64
import json
from typing import Any

import pytest

from finetune_crds.names import AUDIENCE
from finetune_operator.progress_server.reviews import VALID_SECONDS, Bearer, Reviews, plausible

POD = {"pod": {"name": "p", "uid": "u"}, "namespace": "team"}
GOOD: dict[str, Any] = {"aud": [AUDIENCE], "exp": 1000, "kubernetes.io": POD}


def token(claims: object) -> str:
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"e30.{payload}.c2ln"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (token(GOOD), True),
        (token(GOOD | {"aud": AUDIENCE}), True),
        (token(GOOD | {"aud": ["https://kubernetes.default.svc"]}), False),
        (token(GOOD | {"exp": 999}), False),
        (token(GOOD | {"kubernetes.io": {"namespace": "team"}}), False),
        (token([]), False),
        (token({}), False),
        ("", False),
        ("secret", False),
        ("a.b.c", False),
        ("a.b.c.d", False),
        ("a.ü.c", False),
        (token(GOOD) + "x" * 10_000, False),
        (f"e30.{base64.urlsafe_b64encode(b'[' * 3000).decode()}.c2ln", False),
    ],
    ids=[
        "ours",
        "audience as a string",
        "for the API server",
        "expired",
        "bound to no pod",
        "a list",
        "no claims",
        "empty",
        "a word",
        "not base64",
        "four parts",
        "not ASCII",
        "huge",
        "deeply nested",
    ],
)
def test_plausible(text: str, expected: bool) -> None:
    assert plausible(text, now=999.5) is expected


class _Reviewer:
    async def create(self, ref: object, body: object) -> dict[str, Any]:
        extra = {f"authentication.kubernetes.io/pod-{key}": [value] for key, value in (("name", "p"), ("uid", "u"))}
        user = {"username": "system:serviceaccount:team:default", "extra": extra}
        return {"status": {"authenticated": True, "audiences": [AUDIENCE], "user": user}}


async def test_a_pod_is_known_longer_than_its_review_lets_it_in() -> None:
    """Else the first report after each minute counts among the refusals of the address that it shares with others."""
    now = 0.0
    reviews = Reviews(_Reviewer(), clock=lambda: now)  # type: ignore[arg-type]
    mine = token(GOOD | {"exp": 1e12})
    assert reviews.known(mine) is None
    bearer = await reviews.review(mine)
    assert bearer == Bearer("team", "p", "u") == reviews.cached(mine)
    now = VALID_SECONDS + 1
    assert (reviews.cached(mine), reviews.known(mine)) == (None, bearer)
