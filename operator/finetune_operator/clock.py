"""Times of the API: RFC 3339 in UTC with whole seconds. `now` is read once a pass and handed on, so that decisions stay pure."""

from datetime import UTC, datetime


def now() -> datetime:
    """The present, UTC."""
    return datetime.now(UTC)


def stamp(moment: datetime) -> str:
    """As the API writes it: 2026-01-31T12:00:00Z."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def read(text: str) -> datetime:
    """The opposite; takes fractions of a second too."""
    return datetime.fromisoformat(text)


def seconds_between(start: str, end: str | datetime) -> float:
    """Seconds from `start` to `end`, never negative: clocks of nodes differ."""
    later = end if isinstance(end, datetime) else read(end)
    return max(0.0, (later - read(start)).total_seconds())
