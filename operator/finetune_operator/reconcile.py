"""One pass over one FineTuneJob, from top to bottom. queue.py calls it, again and again until there is nothing left to do."""

from . import clock
from .act import act
from .conditions import has_ended
from .decide import decide
from .observe import observe
from .state import Key, State


async def reconcile(state: State, key: Key) -> float | None:
    """Brings one job one step further.

    Returns:
        Seconds after which to look again though nothing has happened; None to wait for the watch.
    """
    now = clock.now()
    seen = await observe(state, key, now)
    if seen is None:
        return None
    decision = decide(seen, now, state.defaults)
    await act(state, seen, decision)
    if has_ended(decision.status):
        for reader in state.readers.pop(key, ()):
            state.wake(reader)
    if decision.settled:
        state.cache.settle(key)
    return decision.requeue
