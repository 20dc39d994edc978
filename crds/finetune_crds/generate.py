"""Writes what is generated: the CRD, the chart's copy of it, the API reference and the table of what is supported. `make generate` and
`make check` call it.
"""

import argparse
import sys
from pathlib import Path

from .reference import markdown, support_markdown
from .schema import crd, to_yaml

ROOT = Path(__file__).resolve().parents[2]
_HEADER = "# Generated from crds/finetune_crds/v1alpha1 by `make generate`.\n"


def chart_template() -> str:
    """The CRD as a chart template: kept on uninstall, switched by crds.install, its braces out of Helm's sight."""
    document = crd()
    document["metadata"]["annotations"] = {"helm.sh/resource-policy": "keep"}
    text = to_yaml(document).replace("{{", '{{ "{{" }}')
    return f"{{{{- if .Values.crds.install }}}}\n{_HEADER}{text}{{{{- end }}}}\n"


def files() -> dict[Path, str]:
    """Path -> content of every generated file."""
    return {
        ROOT / "crds/finetune.dev_finetunejobs.yaml": _HEADER + to_yaml(crd()),
        ROOT / "charts/finetune-operator/templates/crds.yaml": chart_template(),
        ROOT / "docs/reference.md": markdown(),
        ROOT / "docs/support.md": support_markdown(),
    }


def main() -> int:
    """Writes the files, or with --check says which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is out of date")
    check = parser.parse_args().check
    stale = [path for path, content in files().items() if not path.exists() or path.read_text() != content]
    for path in stale:
        if check:
            sys.stderr.write(f"{path.relative_to(ROOT)} is out of date: run `make generate`\n")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files()[path])
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
