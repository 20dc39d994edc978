"""Every example is what the API server would accept, and the quickstart can show what it claims."""

import functools
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from finetune_crds import locations
from finetune_crds.resolved import ResolvedFineTune, ResolvedProgram, ResolvedSpec
from finetune_crds.support import OBJECTIVES, Task
from finetune_crds.v1alpha1.methods import METHODS
from finetune_trainer.local.manifests import load
from finetune_trainer.local.run import check
from finetune_trainer.results.configuration import configuration
from manifests import manifest

EXAMPLES = Path(__file__).parents[3] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))


@functools.cache
def resolved(file: Path) -> ResolvedSpec:
    """As a cluster would take it."""
    return check(load([file]).job, cluster=True).spec


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_valid_in_a_cluster(file: Path) -> None:
    manifests, spec = load([file]), resolved(file)
    assert isinstance(spec, ResolvedProgram if file.stem == "user-program" else ResolvedFineTune)
    for _, place in locations.inputs(spec):
        parsed = locations.parse(place.uri)
        if parsed.scheme == "configmap":
            assert parsed.path in manifests.configmaps[parsed.root]


def test_the_manifest_of_the_readme_is_valid(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(), re.DOTALL)
    assert block
    file = tmp_path / "readme.yaml"
    file.write_text(block[1])
    assert check(load([file]).job, cluster=True).name == "support-bot"


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_of_the_pages_leads_somewhere() -> None:
    root = EXAMPLES.parent
    for page in (root / "README.md", root / "CHANGELOG.md", EXAMPLES / "README.md", *root.glob("docs/**/*.md")):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            if "://" in path:
                continue
            there = page.parent / path if path else page
            assert there.exists(), f"{page.name}: {link}"
            if anchor and there.suffix == ".md":
                assert anchor in anchors(there), f"{page.name}: {link}"


def fine_tunes() -> list[ResolvedFineTune]:
    return [spec for spec in map(resolved, FILES) if isinstance(spec, ResolvedFineTune)]


def test_a_job_can_be_written_again_of_what_is_published() -> None:
    """What stands in the card and in finetune.json, of each job whose inputs are there."""
    jobs = [spec for spec in fine_tunes() if not any(one.uri.startswith("job://") for _, one in locations.inputs(spec))]
    for spec in jobs:
        assert _written_again(spec) == configuration(spec)


@pytest.mark.parametrize(
    "fields",
    [
        {"objective": {"dpo": {"loss": "ipo"}}},
        {"task": "text-classification", "objective": {"classification": {"problem": "regression"}}},
        {
            "task": "text-classification",
            "objective": {"classification": {"classWeights": {"job": "2", "digest": "3", "initialText": "1"}}},
        },
        {
            "objective": {
                "grpo": {"rewards": [{"name": "tests", "entryPoint": "judges:passes", "allowUserCode": True}]}
            },
            "runtime": {"image": "registry.example/judges:v1"},
        },
        {"task": "summarization", "evaluation": {"metric": "eval_rougeL", "maxNewTokens": 9, "everySteps": 5}},
    ],
    ids=["ipo", "regression", "classes", "code", "lengths"],
)
def test_nothing_that_decides_is_left_out(fields: dict[str, Any]) -> None:
    spec = check(manifest(**fields), cluster=True).spec
    assert isinstance(spec, ResolvedFineTune)
    again, given = _written_again(spec), json.dumps(configuration(spec))
    assert json.dumps(again) == given
    for value in fields.get("objective", {}).get("classification", {}).get("classWeights", {}):
        assert f'"{value}"' in given
    assert configuration(spec).get("runtime") == fields.get("runtime")
    assert ("evaluation" not in fields) or '"maxNewTokens": 9' in given


def _written_again(spec: ResolvedFineTune) -> dict[str, Any]:
    places = {"output": spec.output.to_wire(), "checkpoints": spec.checkpoints.to_wire()}
    job = {**manifest(), "spec": {**configuration(spec), **places}}
    again = check(job, cluster=True).spec
    assert isinstance(again, ResolvedFineTune)
    return configuration(again)


def test_what_is_published_names_no_secret_no_prompt_and_no_signature() -> None:
    job = load([EXAMPLES / "prompting.yaml"]).job
    place = {"uri": "https://data.example/rows.jsonl?X-Signature=open-sesame", "secretRef": {"name": "of-the-place"}}
    job["spec"]["dataset"] = {"train": [place], "evaluation": {"sources": [place]}}
    job["spec"]["method"] = {"prompt": {"initialText": "open-sesame"}}
    job["spec"]["runtime"] = {"env": [{"name": "KEY", "value": "open-sesame"}]}
    spec = check(job, cluster=True).spec
    assert isinstance(spec, ResolvedFineTune)
    said = json.dumps(configuration(spec))
    assert not re.search("open-sesame|of-the-place|secretRef|prompts|env", said)
    assert said.count('"https://data.example/rows.jsonl"') == 2


def test_each_method_task_and_objective_is_shown() -> None:
    """One that says none shows the default."""
    assert {spec.method.name for spec in fine_tunes()} == set(METHODS)
    assert {spec.task for spec in fine_tunes()} == set(get_args(Task))
    assert {spec.objective.name for spec in fine_tunes() if spec.objective} == set(OBJECTIVES)


def test_the_program_of_the_example_is_python() -> None:
    program = load([EXAMPLES / "user-program.yaml"]).configmaps["my-program"]["train.py"].decode()
    compile(program, "train.py", "exec")


def test_the_quickstart_asks_what_it_was_not_shown_and_can_know_from_what_it_was() -> None:
    manifests = load([EXAMPLES / "quickstart.yaml"])
    data = manifests.configmaps["quickstart-data"]
    shown, held_out = (
        {row["prompt"]: row["completion"] for row in map(json.loads, data[f"{name}.jsonl"].splitlines())}
        for name in ("train", "evaluation")
    )
    assert not set(shown) & set(held_out)
    assert set(shown.values()) == set(held_out.values())
    assert set(manifests.job["spec"]["evaluation"]["prompts"]) <= set(held_out)
    assert sum(map(len, data.values())) < 100_000
