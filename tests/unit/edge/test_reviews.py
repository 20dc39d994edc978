"""Tokens that could not pass a review are told apart without one. What the API server says of them: tests/api."""

import base64
import json
from typing import Any

import pytest

from finetune_crds.names import AUDIENCE
from finetune_operator.progress_server.reviews import plausible

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
