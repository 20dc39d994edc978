"""`make demo` and `make demo-down`: a Kubernetes, the operator, a fine-tuning job, and what its model learned."""

import argparse
import os
import sys

from rich.console import Console

from .story import down, up
from .target import TargetError, current_cluster, own_cluster


def main() -> int:
    """Runs one command; Ctrl-C leaves everything where the next run picks it up."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument(
        "command", choices=["up", "down"], help="up: run the story, resuming what is there; down: leave nothing behind"
    )
    command = parser.parse_args().command
    console = Console(highlight=False)
    use_current = os.environ.get("DEMO_CLUSTER") == "current"
    try:
        target = current_cluster(console) if use_current else own_cluster(console, start=command == "up")
        if target is None:
            console.print("there is no demo cluster: nothing to remove")
        elif command == "down":
            down(console, target)
        else:
            up(console, target)
    except KeyboardInterrupt:
        console.print("\nstopped; `make demo` goes on from here, `make demo-down` removes everything")
        return 130
    except TargetError as error:
        console.print(f"[bold red]{error}[/]")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
