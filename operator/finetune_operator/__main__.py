"""`finetune-operator`: Kopf runs in this process as the shell (login, probes, signals, watches); the rest is process.py."""

import asyncio
import logging

import kopf
import uvloop

from .handlers import register
from .process import Process
from .settings import Settings


def main(arguments: list[str] | None = None) -> None:
    """Runs until SIGTERM."""
    settings = Settings.parse(arguments)
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    for chatty in ("kopf", "kopf.objects"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(settings))


async def _run(settings: Settings) -> None:
    process = Process(settings)
    await kopf.operator(
        registry=register(process),
        standalone=True,
        clusterwide=not settings.namespaces,
        namespaces=settings.namespaces,
        liveness_endpoint=f"http://0.0.0.0:{settings.liveness_port}/healthz",
    )


if __name__ == "__main__":
    main()
