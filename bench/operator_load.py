"""`make bench-operator`: 500 FineTuneJobs on simulated nodes beside 500 bare Indexed Jobs, on the same control plane in the same run.

What it prints: jobs per second of both and their ratio, API writes a job by verb and resource (from the audit log), CPU
milliseconds of the operator a job, its peak memory; and how long nobody leads when a leader is killed, or asked to end.
Everything runs on this machine, so the control plane's own work is the ceiling: only the ratio and the numbers per job carry
over to others. The table is written to bench/operator_load.md.
"""

import argparse
import itertools
import json
import os
import platform
import secrets
import signal
import statistics
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from api.jobs import FineTuneJob
from api.operators import USER, Operator, install
from cluster.cluster import Cluster

RESULT = Path(__file__).with_suffix(".md")
_PASSES = "finetune_reconcile_seconds_count"
_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--jobs", type=int, default=500)
    arguments.add_argument("--nodes", type=int, default=100)
    given = arguments.parse_args()
    cluster = Cluster.up(f"bench-{os.getpid()}", profile="api", kwok_nodes=given.nodes)
    try:
        install(cluster)
        with tempfile.TemporaryDirectory() as folder:
            operator = Operator(cluster, Path(folder) / "log").start()
            try:
                rows = measure(cluster, operator, given.jobs)
            finally:
                operator.stop()
            rows += fail_over(cluster, Path(folder))
    finally:
        cluster.down()
    lines = [f"| {name} | {value} |" for name, value in rows]
    where = f"{platform.machine()}, {os.cpu_count()} cores, control plane on the same machine, 1-minute load at the end {os.getloadavg()[0]:.1f}"
    table = "\n".join(["| operator benchmark | |", "|---|---|", *lines, "", f"Measured on {where}.", ""])
    print(table)
    RESULT.write_text(table)


def measure(cluster: Cluster, operator: Operator, number: int) -> list[tuple[str, str]]:
    """Runs both loads, a tenth of each first so that neither pays for cold caches."""
    _run(cluster, [_bare(n) for n in range(number // 10)], "jobs", "Complete")
    _run(cluster, [_finetune(n) for n in range(number // 10)], "finetunejobs", "Complete")
    bare = _run(cluster, [_bare(n) for n in range(number)], "jobs", "Complete")
    mark, cpu, passes = cluster.audit.mark(), _cpu_seconds(operator.pid), operator.metric(_PASSES)
    ours = _run(cluster, [_finetune(n) for n in range(number)], "finetunejobs", "Complete")
    time.sleep(3)  # the last events
    cpu = _cpu_seconds(operator.pid) - cpu
    passes = operator.metric(_PASSES) - passes
    sent = [e for e in cluster.audit.since(mark, user=USER) if e.resource != "leases"]
    events = [e for e in sent if e.is_write]
    writes = Counter(f"{e.verb} {e.resource}" + (f"/{e.subresource}" if e.subresource else "") for e in events)
    refused = Counter(e.code for e in events if e.code >= 400)
    return [
        ("jobs", str(number)),
        ("bare Indexed Jobs a second", f"{number / bare:.1f}"),
        ("FineTuneJobs a second", f"{number / ours:.1f}"),
        ("ratio=", f"{bare / ours:.2f}"),
        ("API writes a job", f"{sum(writes.values()) / number:.2f}"),
        *((f"... {verb}", f"{count / number:.2f}") for verb, count in sorted(writes.items())),
        ("API reads a job", f"{(len(sent) - len(events)) / number:.2f}"),
        ("reconcile passes a job", f"{passes / number:.2f}"),
        ("writes refused and repeated", str(dict(refused) or "none")),
        ("operator CPU a job", f"{1000 * cpu / number:.1f} ms"),
        ("operator peak memory", f"{_peak_mebibytes(operator.pid):.0f} MiB"),
    ]


def fail_over(cluster: Cluster, folder: Path, times: int = 5) -> list[tuple[str, str]]:
    """From the signal until the standby has listed what there is and reconciles."""
    rows = []
    with ExitStack() as running:

        def started(number: int, *, wait: bool) -> Operator:
            replica = Operator(cluster, folder / f"log-{number}", f"replica-{number}").start(wait=wait)
            running.callback(replica.stop)
            return replica

        numbers = itertools.count()
        leader = started(next(numbers), wait=True)
        for how, name in ((signal.SIGKILL, "killed"), (signal.SIGTERM, "asked to end")):
            waits = []
            for _ in range(times):
                standby = started(next(numbers), wait=False)
                standby.wait_until(lambda standby=standby: not standby.leads())
                time.sleep(3)  # it has seen the Lease
                began = time.monotonic()
                leader.signal(how)
                standby.wait_until(standby.leads)
                waits.append(time.monotonic() - began)
                leader = standby
            seconds = f"{statistics.median(waits):.1f} s ({min(waits):.1f} to {max(waits):.1f}, {times} times)"
            rows.append((f"a leader that is {name} is replaced after", seconds))
    return rows


def _run(cluster: Cluster, items: list[dict[str, Any]], kind: str, condition: str) -> float:
    """Seconds from the first object created to the last one complete, in a namespace of its own."""
    namespace = f"bench-{secrets.token_hex(3)}"
    cluster.kubectl("create", "namespace", namespace)
    body = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    began = time.monotonic()
    cluster.kubectl("create", "-n", namespace, "-f", "-", stdin=body)
    while True:  # as a table: whole objects would keep the API server busy
        table = cluster.kubectl("get", kind, "-n", namespace, "--no-headers")
        done = sum(condition in line.split() for line in table.splitlines())
        if done == len(items):
            break
        if time.monotonic() - began > 600:
            raise TimeoutError(f"after 600 s only {done} of {len(items)} {kind} are {condition}")
        time.sleep(1)
    seconds = time.monotonic() - began
    return seconds


def _finetune(number: int) -> dict[str, Any]:
    job = FineTuneJob(f"job-{number}", "unused").finishes("1s").body
    del job["metadata"]["namespace"]
    return job


def _bare(number: int) -> dict[str, Any]:
    """What the operator makes of a FineTuneJob, without what the operator adds."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"job-{number}"},
        "spec": {
            "completionMode": "Indexed",
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "template": {
                "metadata": {"annotations": {"kwok.finetune.dev/run-for": "1s"}},
                "spec": {
                    "restartPolicy": "Never",
                    "containers": [
                        {"name": "main", "image": "none", "resources": {"limits": {"nvidia.com/gpu": 1}}},
                    ],
                },
            },
        },
    }


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _peak_mebibytes(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
