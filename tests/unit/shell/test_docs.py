"""The table of exit codes for users has every code, and no other."""

import re
from pathlib import Path

from finetune_crds.verdict import ExitCode


def test_each_exit_code_is_explained() -> None:
    text = (Path(__file__).parents[3] / "docs/local.md").read_text()
    listed = [int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert listed == sorted(ExitCode)


def test_each_example_is_listed() -> None:
    examples = Path(__file__).parents[3] / "examples"
    listed = set(re.findall(r"^\| \[([\w.-]+)\]", (examples / "README.md").read_text(), re.MULTILINE))
    assert listed == {file.name for file in examples.glob("*.yaml")}
