"""Manifest files for `finetune local` and `finetune check`: one FineTuneJob, and the ConfigMaps that lie beside it."""

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune_crds.v1alpha1 import API_VERSION, KIND

from ..errors import UserError

_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
"""2e-4 is a number to kubectl and a string to PyYAML."""


class _Loader(yaml.SafeLoader):
    """Reads scalars as kubectl does, so that what it would send is what is checked."""


class Dumper(yaml.SafeDumper):
    """Writes scalars so that kubectl reads them back as they are."""


for _each in (_Loader, Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


@dataclass(frozen=True)
class Manifests:
    """What the files hold."""

    job: dict[str, Any]
    configmaps: dict[str, dict[str, bytes]]
    """Content by name and key."""


def load(files: Sequence[Path], name: str | None = None) -> Manifests:
    """Reads YAML files of one or more documents. Objects of other kinds are left alone: a cluster may want them.

    Args:
        files: paths.
        name: which FineTuneJob, where there are several.

    Raises:
        UserError: a file cannot be read, or does not hold the job.
    """
    documents = [document for file in files for document in _documents(file)]
    jobs = [document for document in documents if document.get("kind") == KIND]
    if name is not None:
        jobs = [job for job in jobs if _name(job) == name]
    shown = ", ".join(str(file) for file in files)
    if not jobs:
        raise UserError(f"{shown}: there is no {KIND}{f' named {name}' if name else ''} in it")
    if len(jobs) > 1:
        raise UserError(f"{shown}: holds {len(jobs)} {KIND}s; choose one by --name: {', '.join(map(_name, jobs))}")
    if jobs[0].get("apiVersion") != API_VERSION:
        raise UserError(f"{shown}: apiVersion of {KIND} {_name(jobs[0])} must be {API_VERSION}")
    return Manifests(jobs[0], {_name(d): _contents(d) for d in documents if d.get("kind") == "ConfigMap"})


def _documents(file: Path) -> Iterator[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        for document in yaml.load_all(text, _Loader):
            if isinstance(document, dict):
                yield document
            elif document is not None:
                raise UserError(f"{file}: holds something that is no Kubernetes object")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{file}{where}: is no YAML ({getattr(error, 'problem', None) or 'cannot be parsed'})"
        ) from None


def _name(document: dict[str, Any]) -> str:
    return str((document.get("metadata") or {}).get("name", ""))


def _contents(configmap: dict[str, Any]) -> dict[str, bytes]:
    text = {key: str(value).encode() for key, value in (configmap.get("data") or {}).items()}
    return text | {key: base64.b64decode(value) for key, value in (configmap.get("binaryData") or {}).items()}
