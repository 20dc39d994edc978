"""From kubectl apply to an output that opens: tasks, methods, places, many pods, users' own programs."""

import json
import time

from finetune_crds.verdict import ExitCode
from shell.registries import PASSWORD, RealRegistry

from .workbench import CLAIM, MODEL, Json, Workbench


def test_a_lora_is_checked_trains_tells_its_story_and_is_not_trained_twice(workbench: Workbench) -> None:
    spec: Json = {
        "dataset": {"train": [{"uri": "configmap://rows/train.jsonl"}], "evaluation": {"fraction": "0.25"}},
        "evaluation": {"everySteps": 10, "prompts": ["What is 1 plus 2?"], "maxNewTokens": 8},
    }
    workbench.job("lora", preflight="Required", **spec)
    status = workbench.wait("lora", "Complete")
    assert status["phase"] == "Complete"
    check = status["preflight"]
    assert check["state"] == "Passed"
    assert check["report"]["steps"] == status["progress"]["totalSteps"] == status["progress"]["step"] == 20
    assert check["report"]["rows"] == status["inputs"]["rows"]
    assert status["progress"]["percentage"] == 100
    assert {"loss", "eval_loss"} <= {metric["name"] for metric in status["metrics"]}
    assert status["checkpoints"]["latest"]["step"] == 20
    assert status["inputs"]["rows"] > 0 < status["inputs"]["evaluationRows"]
    assert status["inputs"]["datasetDigest"].startswith("sha256:")
    assert status["output"]["format"] == "peft"
    assert status["output"]["digest"].startswith("sha256:")
    (attempt,) = status["attempts"]
    assert (attempt["outcome"], attempt["runs"], attempt["lastStep"]) == ("Finished", 1, 20)
    assert status["evaluation"]["before"] and status["evaluation"]["after"]
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "README.md",
        "samples.jsonl",
    } <= workbench.files("out/lora")
    answers = [json.loads(line) for line in workbench.read("out/lora/samples.jsonl").splitlines()]
    assert {row["step"] for row in answers} >= {0, 20}
    workbench.until("lora", lambda _: "Completed" in workbench.events("lora"), what="the last event")
    story = ["PreflightRunning", "PreflightPassed", "Created", "PodsRunning", "Completed"]
    assert [reason for reason in workbench.events("lora") if reason in story] == story
    assert workbench.exit_codes("lora") == [ExitCode.FINISHED, ExitCode.FINISHED], "the preflight's and the trainer's"

    workbench.job("again", output={"uri": f"pvc://{CLAIM}/out/lora"}, **spec)
    again = workbench.wait("again", "Complete")["output"]
    assert (again["reused"], again["digest"]) == (True, status["output"]["digest"])


def test_full_fine_tuning_writes_a_model_and_cleanup_keeps_the_record(workbench: Workbench) -> None:
    workbench.job("full", method={"full": {}}, cleanup={"afterSeconds": 1})
    assert workbench.wait("full", "Complete")["output"]["format"] == "transformers"
    assert {"config.json", "model.safetensors"} <= workbench.files("out/full")
    workbench.until("full", lambda _: workbench.children("full") == [], what="no child")
    workbench.job("full", method={"full": {}}, cleanup={"afterSeconds": 1})
    time.sleep(5)
    assert workbench.status("full")["phase"] == "Complete"
    assert workbench.pods("full") == []


def test_qlora_merges_into_what_it_was_trained_on(workbench: Workbench) -> None:
    """Quantised weights under the restricted profile, and both outputs: the model, and the adapter alone."""
    workbench.job(
        "qlora",
        method={"qlora": {"rank": 4}},
        dataset={"train": [{"uri": "configmap://rows/train.jsonl"}], "evaluation": {"fraction": "0.25"}},
        output={"uri": f"pvc://{CLAIM}/out/qlora", "merged": True},
    )
    status = workbench.wait("qlora", "Complete")
    assert (status["output"]["format"], status["output"]["servableBy"]) == ("transformers", ["vllm"])
    before, after = ({m["name"]: float(m["value"]) for m in status["evaluation"][when]} for when in ("before", "after"))
    assert after["eval_loss"] < before["eval_loss"]
    assert {"config.json", "model.safetensors", "adapter"} <= workbench.files("out/qlora")
    assert "adapter_config.json" in workbench.files("out/qlora/adapter")


def test_two_pods_train_as_one(workbench: Workbench) -> None:
    workbench.job(
        "pair",
        resources={
            "nodes": 2,
            "gpusPerNode": 0,
            "cpu": "100m",
            "memory": "1500Mi",
            "scratch": "1Gi",
            "sharedMemory": "64Mi",
        },
    )
    status = workbench.wait("pair", "Complete", seconds=240)
    assert status["attempts"][0]["lastStep"] == 20
    assert {
        pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] for pod in workbench.pods("pair")
    } == {"0", "1"}


def test_a_classifier_with_data_and_output_on_s3(workbench: Workbench, s3: dict[str, str]) -> None:
    place = {"secretRef": {"name": "s3"}, "endpoint": s3["endpoint"]}
    workbench.job(
        "bucket",
        task="text-classification",
        dataset={
            "train": [{"uri": f"s3://{s3['bucket']}/data/train*.jsonl", **place}],
            "evaluation": {"fraction": "0.25"},
        },
        output={"uri": f"s3://{s3['bucket']}/out/bucket", **place},
    )
    status = workbench.wait("bucket", "Complete")
    assert "eval_accuracy" in {metric["name"] for metric in status["evaluation"]["after"]}
    assert status["output"]["uri"] == f"s3://{s3['bucket']}/out/bucket"
    assert s3["secret"] not in json.dumps(workbench.object("bucket")) + workbench.log("bucket")


def test_a_chain_that_is_applied_at_once_is_pinned_from_link_to_link(
    workbench: Workbench, models: RealRegistry
) -> None:
    """sft into a registry and a reward model onto a claim, and grpo that continues the one and is judged by the other."""
    tiny = {"uri": f"pvc://{CLAIM}/{MODEL}"}
    image = {"endpoint": f"http://{models.host}", "secretRef": {"name": "models"}}
    kept = {"storage": {"uri": f"pvc://{CLAIM}/checkpoints"}}
    workbench.job(
        "chained",
        model={**tiny, "adapter": {"job": "manners", "secretRef": {"name": "models"}}},
        objective={
            "grpo": {
                "rewards": [{"name": "liked", "model": {"job": "judge"}}],
                "maxCompletionLength": 8,
                "generations": 4,
            }
        },
        dataset={"train": [{"uri": "configmap://rows/questions.jsonl"}], "evaluation": {"fraction": "0"}},
        training={"maxSteps": 3, "batchSize": 2, "sequenceLength": 64},
        checkpoints=kept,
        output={"uri": f"oci://{models.host}/team/chained:v1", **image},
    )
    workbench.job("manners", checkpoints=kept, output={"uri": f"oci://{models.host}/team/manners:v1", **image})
    judged = {"train": [{"uri": "configmap://rows/preferences.jsonl"}], "evaluation": {"fraction": "0"}}
    workbench.job("judge", objective={"reward": {}}, dataset=judged)
    status = workbench.wait("chained", "Complete", seconds=300)
    assert "WaitingForJob" in workbench.events("chained")
    manners, judge = (workbench.status(name)["output"]["digest"] for name in ("manners", "judge"))
    assert status["inputs"]["adapter"]["digest"] == manners
    assert status["inputs"]["rewards"][0]["adapter"]["digest"] == judge
    assert manners != status["output"]["digest"]
    assert {manners, status["output"]["digest"]} <= models.blobs(), "what status tells is what the registry holds"
    assert PASSWORD not in json.dumps(workbench.object("chained")) + workbench.log("chained")


STOCK_SCRIPT = """
import time
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 30

    def __getitem__(self, i):
        time.sleep(0.3)
        return {"input_ids": torch.arange(16), "labels": torch.arange(16)}

model = AutoModelForCausalLM.from_pretrained("/finetune/volumes/work/tiny-llama")
arguments = TrainingArguments("/finetune/scratch/out", num_train_epochs=1, per_device_train_batch_size=1, logging_steps=1,
                              save_strategy="no", use_cpu=True, disable_tqdm=True)
Trainer(model, arguments, train_dataset=Slow()).train()
"""
"""Thirty steps in nine seconds; the callback reports at the start, every five seconds and at the end."""


def test_an_unmodified_trainer_script_reports_and_completes(workbench: Workbench) -> None:
    workbench.job(
        "stock",
        model={"uri": f"pvc://{CLAIM}/tiny-llama"},
        dataset=None,
        output=None,
        training=None,
        checkpoints=None,
        runtime={"image": workbench.trainer_image, "command": ["python", "-c", STOCK_SCRIPT]},
    )
    begun = workbench.until("stock", lambda status: bool(status.get("progress")), what="a report")["progress"]
    assert (begun["percentage"], begun["totalSteps"], begun["display"]) == (0, 30, "0 %")
    (pod,) = workbench.pods("stock")
    assert begun["pod"] == pod["metadata"]["name"]
    status = workbench.wait("stock", "Complete")
    progress = status["progress"]
    assert (progress["percentage"], progress["totalSteps"]) == (100, 30)
    assert 0 < progress["step"] <= 30, "the last one that a report told"
    metrics = {metric["name"] for metric in status["metrics"]}
    assert metrics >= {"loss", "grad_norm", "learning_rate"}
    assert not {"current_step", "total_steps", "current_epoch"} & metrics


MAKE_IMAGES = """
import sys, tempfile
from pathlib import Path
from finetune_trainer.data.image_workers import ImageWorkers
if __name__ == "__main__":
    sys.path.insert(0, tempfile.mkdtemp())
    Path(sys.path[0], "maker.py").write_text(
        "import torch\\ndef make(number): return {'pixels': torch.full((3, 224, 224), number)}"
    )
    from maker import make
    workers = ImageWorkers(make, make(0.0), 3)
    made = workers([(float(i),) for i in range(100)])["pixels"]
    sys.exit(made[:, 2, 3, 4].tolist() != [float(i) for i in range(100)])
"""
"""What a training of images does where a job has more than two processors, which this node has not."""


def test_processes_make_images_in_a_confined_pod(workbench: Workbench) -> None:
    workbench.job(
        "images",
        model=None,
        dataset=None,
        output=None,
        training=None,
        checkpoints=None,
        runtime={"image": workbench.trainer_image, "command": ["python", "-c", MAKE_IMAGES]},
    )
    workbench.wait("images", "Complete")


def test_each_mistake_fails_once_and_is_mended_by_an_edit(workbench: Workbench) -> None:
    rows = "configmap://rows/train.jsonl"
    columns = {"train": [{"uri": rows}], "columns": {"messages": "talk"}, "format": "chat"}
    mistakes: dict[str, Json] = {
        "nowhere": {"model": {"uri": f"pvc://{CLAIM}/nowhere"}},
        "absent.jsonl": {"dataset": {"train": [{"uri": "configmap://rows/absent.jsonl"}]}},
        "talk": {"dataset": columns},
    }
    for number, (named, change) in enumerate(mistakes.items(), start=1):
        workbench.job("wrong", **change)
        failed = workbench.wait("wrong", "Failed")
        assert named in failed["failure"]["message"]
        cause, code = failed["failure"]["cause"], failed["failure"]["exitCode"]
        assert (cause, code) in (("UserError", ExitCode.USER_ERROR), ("DataError", ExitCode.DATA_ERROR))
        assert workbench.exit_codes("wrong")[-1] == code
        assert len(failed["attempts"]) == number, "never retried"
    workbench.job("wrong")
    assert len(workbench.wait("wrong", "Complete")["attempts"]) == len(mistakes) + 1


def test_what_a_preflight_finds_is_named_by_row_and_never_trains(workbench: Workbench) -> None:
    rows = [{"prompt": "one", "completion": "two"}, {"prompt": "three"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    workbench.cluster.api.create(
        "configmaps", {"metadata": {"name": "wrong"}, "data": {"train.jsonl": lines}}, workbench.namespace
    )
    dataset = {"train": [{"uri": "configmap://wrong/train.jsonl"}], "evaluation": {"fraction": "0"}}
    workbench.job("checked", preflight="Required", dataset=dataset)
    status = workbench.wait("checked", "Failed")
    assert status["failure"]["cause"] == "DataError"
    assert "row 2" in status["failure"]["message"]
    assert status["preflight"]["state"] == "Failed" and "attempts" not in status
    assert [job["metadata"]["name"][-3:] for job in workbench.jobs("checked")] == ["-p1"]
