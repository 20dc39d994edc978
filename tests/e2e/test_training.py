"""From kubectl apply to an output that opens: tasks, methods, places, many pods, users' own programs."""

import json

import pytest

from .workbench import CLAIM, Workbench


def test_a_lora_trains_and_status_tells_its_story(workbench: Workbench) -> None:
    workbench.job(
        "lora",
        dataset={"train": [{"uri": "configmap://rows/train.jsonl"}], "evaluation": {"fraction": "0.25"}},
        evaluation={"everySteps": 10, "prompts": ["What is 1 plus 2?"], "maxNewTokens": 8},
    )
    status = workbench.wait("lora", "Complete")
    assert status["phase"] == "Complete"
    assert status["progress"]["percentage"] == 100
    assert status["progress"]["step"] == status["progress"]["totalSteps"] == 20
    assert {"loss", "eval_loss"} <= {metric["name"] for metric in status["metrics"]}
    assert status["checkpoints"]["latest"]["step"] == 20
    assert status["inputs"]["rows"] > 0 < status["inputs"]["evaluationRows"]
    assert status["inputs"]["datasetDigest"].startswith("sha256:")
    assert status["output"]["format"] == "peft"
    assert status["output"]["digest"].startswith("sha256:")
    (attempt,) = status["attempts"]
    assert (attempt["outcome"], attempt["runs"], attempt["lastStep"]) == ("Finished", 1, 20)
    assert status["evaluation"]["before"] and status["evaluation"]["after"]
    names = set(workbench.shell(f"ls /{CLAIM}/out/lora").split())
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md", "samples.jsonl"} <= names
    answers = [json.loads(line) for line in workbench.read("out/lora/samples.jsonl").splitlines()]
    assert {row["step"] for row in answers} >= {0, 20}
    assert workbench.events("lora")[0] == "Created"
    assert workbench.events("lora")[-1] == "Completed"


def test_an_equal_job_reuses_the_output(workbench: Workbench) -> None:
    workbench.job("first")
    first = workbench.wait("first", "Complete")
    workbench.job("second", output={"uri": f"pvc://{CLAIM}/out/first"})
    second = workbench.wait("second", "Complete")
    assert second["output"]["reused"] is True
    assert second["output"]["digest"] == first["output"]["digest"]


def test_full_fine_tuning_writes_a_model(workbench: Workbench) -> None:
    workbench.job("full", method={"full": {}})
    assert workbench.wait("full", "Complete")["output"]["format"] == "transformers"
    assert {"config.json", "model.safetensors"} <= set(workbench.shell(f"ls /{CLAIM}/out/full").split())


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
    assert {"config.json", "model.safetensors", "adapter"} <= set(workbench.shell(f"ls /{CLAIM}/out/qlora").split())
    assert "adapter_config.json" in workbench.shell(f"ls /{CLAIM}/out/qlora/adapter").split()


def test_classification(workbench: Workbench) -> None:
    workbench.job(
        "classes",
        task="text-classification",
        dataset={"train": [{"uri": "configmap://rows/labelled.jsonl"}], "evaluation": {"fraction": "0.25"}},
    )
    status = workbench.wait("classes", "Complete")
    assert "eval_accuracy" in {metric["name"] for metric in status["evaluation"]["after"]}


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


def test_data_and_output_on_s3(workbench: Workbench, s3: dict[str, str]) -> None:
    place = {"secretRef": {"name": "s3"}, "endpoint": s3["endpoint"]}
    workbench.job(
        "bucket",
        dataset={"train": [{"uri": f"s3://{s3['bucket']}/data/train*.jsonl", **place}]},
        output={"uri": f"s3://{s3['bucket']}/out/bucket", **place},
    )
    status = workbench.wait("bucket", "Complete")
    assert status["output"]["uri"] == f"s3://{s3['bucket']}/out/bucket"
    assert s3["secret"] not in json.dumps(workbench.get("finetunejob", "bucket")) + workbench.log("bucket")


STOCK_SCRIPT = """
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
model = AutoModelForCausalLM.from_pretrained("/finetune/volumes/work/tiny-llama")
rows = [{"input_ids": torch.arange(16), "labels": torch.arange(16)}] * 64
arguments = TrainingArguments(output_dir="/finetune/scratch/out", max_steps=40, logging_steps=5, save_strategy="no",
                              use_cpu=True, report_to=[], disable_tqdm=True)
Trainer(model=model, args=arguments, train_dataset=rows).train()
"""


def test_an_unmodified_trainer_script_reports_and_completes(workbench: Workbench) -> None:
    workbench.job(
        "stock",
        model={"uri": f"pvc://{CLAIM}/tiny-llama"},
        dataset=None,
        output=None,
        training=None,
        runtime={"image": workbench.trainer_image, "command": ["python", "-c", STOCK_SCRIPT]},
    )
    status = workbench.wait("stock", "Complete")
    assert status["progress"]["percentage"] == 100
    assert "loss" in {metric["name"] for metric in status["metrics"]}


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("no-model", {"model": {"uri": f"pvc://{CLAIM}/absent"}}, "absent"),
        ("no-key", {"dataset": {"train": [{"uri": "configmap://rows/absent.jsonl"}]}}, "absent.jsonl"),
        (
            "no-column",
            {
                "dataset": {
                    "train": [{"uri": "configmap://rows/train.jsonl"}],
                    "columns": {"messages": "talk"},
                    "format": "chat",
                }
            },
            "talk",
        ),
    ],
)
def test_a_mistake_fails_once_and_is_mended_by_an_edit(
    workbench: Workbench, name: str, change: dict[str, object], sentence: str
) -> None:
    workbench.job(name, **change)
    failed = workbench.wait(name, "Failed", seconds=90)
    assert sentence in failed["failure"]["message"]
    assert failed["failure"]["cause"] in ("UserError", "DataError")
    assert len(failed["attempts"]) == 1
    assert len(workbench.pods(name)) == 1
    workbench.job(name)
    assert len(workbench.wait(name, "Complete")["attempts"]) == 2
