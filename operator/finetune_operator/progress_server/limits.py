"""Token buckets by key, in bounded memory: what keeps a flood from costing more than a dictionary look-up."""

import time
from collections import OrderedDict
from collections.abc import Callable


class RateLimit:
    """At most `burst` at once and `per_second` in the long run, for each key.

    Keys beyond `keys` push out those used longest ago, so that an attacker who invents keys cannot fill the memory.
    """

    def __init__(
        self, per_second: float, burst: int, *, keys: int = 20_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second = per_second
        self._burst = burst
        self._keys = keys
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_seconds(self, key: str) -> float:
        """Seconds until the next one is allowed; 0 when it is now. Takes nothing."""
        return max(0.0, (1.0 - self._level(key)) / self._per_second)

    def take(self, key: str) -> float:
        """Takes one if allowed, and returns 0; else the seconds to wait."""
        wait = self.wait_seconds(key)
        if wait == 0.0:
            self.spend(key)
        return wait

    def spend(self, key: str) -> None:
        """Takes one whether or not it is there; never below zero."""
        self._buckets[key] = (max(0.0, self._level(key) - 1.0), self._clock())
        self._buckets.move_to_end(key)
        while len(self._buckets) > self._keys:
            self._buckets.popitem(last=False)

    def _level(self, key: str) -> float:
        held = self._buckets.get(key)
        if held is None:
            return float(self._burst)
        level, at = held
        return min(float(self._burst), level + (self._clock() - at) * self._per_second)
