"""Ports for programs that listen only seconds after theirs were chosen."""

import fcntl
import random
import socket

from .paths import cache_root

_PORTS = range(20_000, 29_000)
"""Outgoing connections take theirs from 32768 on, Kubernetes its NodePorts from 30000 on."""


def free_ports(number: int) -> list[int]:
    """Ports on which nobody listens. Each is handed out once on this machine before the first comes again."""
    cache_root().mkdir(parents=True, exist_ok=True)
    with (cache_root() / ".port").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        latest = int(file.read() or random.choice(_PORTS))
        found: list[int] = []
        while len(found) < number:
            latest = latest + 1 if latest + 1 in _PORTS else _PORTS.start
            if _is_free(latest):
                found.append(latest)
        file.truncate(0)
        file.write(str(latest))
    return found


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
