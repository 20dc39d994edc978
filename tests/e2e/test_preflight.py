"""A preflight in a real pod: what passes trains, what is wrong is named by row, and nothing of it is left."""

import json

from .workbench import CLAIM, Workbench


def test_what_passes_trains(workbench: Workbench) -> None:
    workbench.job("checked", preflight="Required")
    status = workbench.wait("checked", "Complete", seconds=300)
    check = status["preflight"]
    assert check["state"] == "Passed"
    assert check["report"]["steps"] == status["progress"]["totalSteps"] == 20
    assert check["report"]["rows"] == status["inputs"]["rows"]
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["Finished"]
    told = workbench.events("checked")
    assert told.index("PreflightRunning") < told.index("PreflightPassed") < told.index("PodsRunning")


def test_what_is_wrong_is_named_by_row_and_never_trains(workbench: Workbench) -> None:
    rows = [{"prompt": "one", "completion": "two"}, {"prompt": "three"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    data = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "wrong"}, "data": {"train.jsonl": lines}}
    workbench.kubectl("apply", "-f", "-", stdin=json.dumps(data))
    dataset = {"train": [{"uri": "configmap://wrong/train.jsonl"}], "evaluation": {"fraction": "0"}}
    workbench.job("wrong", preflight="Required", dataset=dataset, output={"uri": f"pvc://{CLAIM}/out/wrong"})
    status = workbench.wait("wrong", "Failed", seconds=300)
    assert status["failure"]["cause"] == "DataError"
    assert "row 2" in status["failure"]["message"]
    assert status["preflight"]["state"] == "Failed" and "attempts" not in status
    assert [job["metadata"]["name"][-3:] for job in workbench.jobs("wrong")] == ["-p1"]
