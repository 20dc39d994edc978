"""The command line: `python -m cluster up|down|status|kubeconfig|build`."""

import argparse
from collections.abc import Sequence
from typing import Literal

from . import images
from .binaries import API_PROFILE, FULL_PROFILE, TOOLS, find_all
from .cluster import Cluster
from .console import say
from .errors import ClusterError
from .model import TINY_LLAMA, model_path
from .packages import NODE, install_missing
from .paths import cache_root
from .registry import publish
from .settings import Profile


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its exit code. What the user can act on is one sentence, without a traceback."""
    try:
        return _run(_parser().parse_args(arguments))
    except ClusterError as error:
        say(str(error))
        return 1


def _run(options: argparse.Namespace) -> int:
    if options.command == "up":
        cluster = Cluster.up(options.name or options.profile, options.profile, options.kwok_nodes)
        say(f"cluster {cluster.settings.name} is up: export KUBECONFIG={cluster.kubeconfig}")
        return 0
    if options.command == "build":
        _build("tools" if options.tools else options.profile)
        return 0
    if options.command == "status" and options.name is None:
        for folder in sorted((cache_root() / "run").glob("*/cluster.json")):
            _status(folder.parent.name)
        return 0
    name = options.name or options.profile
    found = Cluster.attach(name)
    if found is None:
        say(f"there is no cluster {name!r}")
        return 0 if options.command == "down" else 1
    if options.command == "down":
        found.down()
        say(f"cluster {name} is gone; what was built stays in {cache_root()}")
    elif options.command == "kubeconfig":
        print(found.kubeconfig)
    else:
        _status(name)
    return 0


def _build(what: Profile | Literal["tools"]) -> None:
    """What is made once a machine, minutes of it: so that no test's time limit has to allow for it, nor for waiting until another's build is done."""
    find_all({"full": FULL_PROFILE, "api": API_PROFILE, "tools": TOOLS}[what])
    if what == "full":
        install_missing(NODE)
        for image in (images.OPERATOR, images.TRAINER):
            publish(image)
        model_path(TINY_LLAMA)


def _status(name: str) -> None:
    cluster = Cluster.attach(name)
    if cluster is None:
        return
    print(f"{name}  profile={cluster.settings.profile}  {cluster.settings.server}  {cluster.settings.folder}")
    for process in cluster.processes:
        print(f"  {process.name:<26}{'pid ' + str(process.pid) if process.pid else 'not running'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in {
        "up": "start what is not running; quick when everything is",
        "down": "end and remove everything of the cluster; what was built stays",
        "status": "which processes run (of all clusters without --name)",
        "kubeconfig": "print the path of the administrator's kubeconfig",
        "build": "build or find the programs (full: the images too), start nothing",
    }.items():
        each = commands.add_parser(command, help=text)
        each.add_argument(
            "--profile",
            choices=("api", "full"),
            default="api",
            help="api: control plane and simulated nodes (default); full: also a real node, as root",
        )
        each.add_argument("--name", help="name of the cluster (default: the profile's)")
        if command == "build":
            each.add_argument("--tools", action="store_true", help="only what the trainer's own tests need")
        if command == "up":
            each.add_argument("--kwok-nodes", type=int, default=0, metavar="N", help="simulated nodes of 8 GPUs each")
    return parser
