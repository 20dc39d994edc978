"""What a run leaves: it opens with plain libraries, is used again by an equal job and by jobs that continue it, and harms no file of others."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_crds.verdict import ExitCode
from finetune_trainer import train

from . import tiny
from .runs import finish, opened_as_its_card_says, run
from .test_run import QUICK, chat_job


def test_an_adapter_opens_with_plain_peft_and_answers_as_the_samples_say(tmp_path: Path, llama: Path) -> None:
    """One row a hundred times: whatever the processor rounds to, its answer is learned."""
    said = [{"role": "user", "content": "red blue"}, {"role": "assistant", "content": "blue blue"}]
    data = tiny.write_rows(tmp_path / "train.jsonl", [{"messages": said}] * 8)
    job = tiny.job(
        tmp_path, llama, data,
        training={"maxSteps": 60, "batchSize": 8, "learningRate": "5e-3", "sequenceLength": 256},
        evaluation={"prompts": ["red blue"], "maxNewTokens": 12},
    )  # fmt: skip
    verdict = finish(job, tmp_path)
    assert verdict.output and verdict.output.format == "peft" and verdict.output.servable_by == ["vllm"]

    output = tmp_path / "output"
    model = opened_as_its_card_says(output)
    tokenizer: Any = AutoTokenizer.from_pretrained(output)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "red blue"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [sample["when"] for sample in samples] == ["before", "after"]
    assert samples[1]["answer"] == answer
    assert answer == "blue blue" != samples[0]["answer"]
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"]) and "lm_head" not in config["target_modules"]


def test_a_full_model_opens_with_plain_transformers(tmp_path: Path, llama: Path) -> None:
    verdict = run(chat_job(tmp_path, llama, method={"full": {}}), tmp_path)
    assert verdict.code == 0, verdict.message
    assert verdict.output and verdict.output.format == "transformers"
    assert opened_as_its_card_says(tmp_path / "output")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "output", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    base = AutoModelForCausalLM.from_pretrained(llama)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)]
    assert all(moved), "every weight is trained"


def labelled_rows() -> list[dict[str, str]]:
    """A class that the first of two words decides."""
    return [
        {"text": f"{word} {noise}", "label": "warm" if word in ("red", "iron") else "cold"}
        for word in ("red", "iron", "blue", "river")
        for noise in tiny.WORDS
    ]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_classification(tmp_path: Path, llama: Path, method: str) -> None:
    """The head is trained in full, saved with the adapter, and found again; learning shows in accuracy and F1."""
    rows = labelled_rows()
    data = tiny.write_rows(tmp_path / "train.jsonl", rows)
    job = tiny.job(
        tmp_path, llama, data, task="text-classification", method={method: {}},
        dataset={"evaluation": {"fraction": "0.3"}},
        training={"maxSteps": 90, "batchSize": 8, "learningRate": "1e-2" if method == "lora" else "3e-3", "sequenceLength": 64},
        evaluation={"everySteps": 20, "metric": "eval_f1"},
    )  # fmt: skip
    verdict = finish(job, tmp_path)
    after = {metric.name: float(metric.value) for metric in (verdict.evaluation and verdict.evaluation.after) or []}
    assert after["eval_accuracy"] > 0.9 and after["eval_f1"] > 0.9

    output = tmp_path / "output"
    model = opened_as_its_card_says(output)
    assert verdict.output and verdict.output.servable_by == []
    tokenizer: Any = AutoTokenizer.from_pretrained(output)
    said = [
        model.config.id2label[int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())]
        for text in ("red door", "river door")
    ]
    assert said == ["warm", "cold"]


def test_continuing_a_classifier_keeps_its_classes(tmp_path: Path, llama: Path) -> None:
    """The second set has one class less, and in another order; the head's outputs mean what they meant."""
    rows = [{"text": row["text"], "label": label} for row, label in zip(labelled_rows(), "zyx" * 99, strict=False)]
    training = {"maxSteps": 3, "batchSize": 8, "learningRate": "1e-3"}
    first = tiny.job(
        tmp_path / "first",
        llama,
        tiny.write_rows(tmp_path / "1.jsonl", rows),
        task="text-classification",
        training=training,
    )
    finish(first, tmp_path / "first")
    data = tiny.write_rows(tmp_path / "2.jsonl", [row for row in rows if row["label"] != "x"])
    job = tiny.job(
        tmp_path / "second", llama, data, task="text-classification", training=training,
        model={"adapter": {"uri": f"file://{tmp_path}/first/output"}},
    )  # fmt: skip
    finish(job, tmp_path / "second")
    assert opened_as_its_card_says(tmp_path / "second/output").config.id2label == {0: "x", 1: "y", 2: "z"}


def test_continuing_from_an_adapter(tmp_path: Path, llama: Path) -> None:
    first = chat_job(tmp_path / "first", llama, method={"lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}})
    finish(first, tmp_path / "first")
    adapter = tmp_path / "first/output"
    job = chat_job(
        tmp_path / "second",
        llama,
        model={"adapter": {"uri": f"file://{adapter}"}},
        training=QUICK | {"learningRate": "0", "maxSteps": 1},
    )
    finish(job, tmp_path / "second")
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "second/output")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "a learning rate of 0 gives the adapter back"
    config = json.loads((tmp_path / "second/output/adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (4, ["q_proj", "v_proj"])


def test_another_user_can_read_the_output(tmp_path: Path, llama: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    assert run(chat_job(tmp_path, llama), tmp_path).code == 0
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005 and folder.owner() == "root" and folder != Path("/"):
            folder.chmod(0o755)  # pytest's own folders are private
    for folder in ("output", "output.checkpoints"):
        assert readable_by_others(tmp_path / folder) > 50_000


def readable_by_others(folder: Path) -> int:
    """Bytes of all files, as another user reads them."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(12345)
            os.setuid(12345)
            os.write(write, str(sum(len(path.read_bytes()) for path in folder.rglob("*") if path.is_file())).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return int(pipe.read() or 0)


def test_an_equal_job_reuses_the_output(tmp_path: Path, llama: Path) -> None:
    job = chat_job(tmp_path, llama)
    first = run(job, tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "output").iterdir()}
    again = run(job, tmp_path, run_id="second")
    assert again.output and first.output
    assert (again.code, again.output.reused, again.output.digest) == (0, True, first.output.digest)
    assert again.step == again.total_steps == 6
    assert times == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "output").iterdir()}


def test_another_job_replaces_the_output_of_the_first(tmp_path: Path, llama: Path) -> None:
    assert run(chat_job(tmp_path, llama), tmp_path).code == 0
    verdict = run(chat_job(tmp_path, llama, training=QUICK | {"seed": 1}), tmp_path)
    assert verdict.code == 0 and verdict.output and not verdict.output.reused
    assert not list(tmp_path.glob(".output*"))


@pytest.mark.parametrize("far", [False, True], ids=["volume", "elsewhere"])
@pytest.mark.parametrize("trained_before", [False, True])
def test_files_of_others_are_never_overwritten(tmp_path: Path, llama: Path, far: bool, trained_before: bool) -> None:
    if trained_before:
        assert run(chat_job(tmp_path, llama, training=QUICK | {"seed": 1}), tmp_path).code == 0
    tiny.write_rows(tmp_path / "output/thesis.txt", [])
    job = chat_job(tmp_path, llama)
    context = tiny.context(job, tmp_path / "scratch")
    verdict = train.run(
        job, dataclasses.replace(context, output=tiny.Elsewhere(tmp_path / "output")) if far else context
    )
    assert verdict.code == ExitCode.USER_ERROR
    assert "spec.output" in verdict.message and "thesis.txt" in verdict.message
    assert verdict.step == 0
    assert (tmp_path / "output/thesis.txt").exists()


def test_an_output_with_a_note_beside_it_is_still_reused(tmp_path: Path, llama: Path) -> None:
    job = chat_job(tmp_path, llama)
    finish(job, tmp_path)
    (tmp_path / "output/notes.txt").write_text("good one")
    again = run(job, tmp_path, run_id="second")
    assert again.output and again.output.reused


def test_checkpoints_inside_the_output_are_refused(tmp_path: Path, llama: Path) -> None:
    job = chat_job(tmp_path, llama, checkpoints={"storage": {"uri": f"file://{tmp_path}/output/state"}})
    verdict = run(job, tmp_path)
    assert verdict.code == ExitCode.USER_ERROR
    assert "checkpoints.storage lies inside spec.output" in verdict.message


def test_a_store_that_is_no_folder(tmp_path: Path, llama: Path) -> None:
    """The same checkpoints and the same output, through uploads and downloads."""
    spec = {"dataset": {"evaluation": {"fraction": "0.3"}}, "evaluation": {"everySteps": 2}}
    near, far = chat_job(tmp_path / "near", llama, **spec), chat_job(tmp_path / "far", llama, **spec)
    finish(near, tmp_path / "near")

    def elsewhere(reporter: tiny.Recorder) -> Any:
        context = tiny.context(
            far, tmp_path / f"scratch-{reporter.stop_at}", run_id=str(reporter.stop_at), reporter=reporter
        )
        stores = {
            "checkpoints": tiny.Elsewhere(tmp_path / "far/output.checkpoints"),
            "output": tiny.Elsewhere(tmp_path / "far/output"),
        }
        return dataclasses.replace(context, **stores)

    other = chat_job(tmp_path / "far", llama, training=QUICK | {"seed": 1}, evaluation={"prompts": ["one"]})
    finish(other, tmp_path / "far")
    assert (tmp_path / "far/output/samples.jsonl").exists(), "a file that the new output does not have"
    stopped = train.run(far, elsewhere(tiny.Recorder(stop_at=3)))
    assert stopped.code == ExitCode.STOPPED, stopped.message
    finished = train.run(far, elsewhere(tiny.Recorder()))
    assert (finished.code, finished.first_step) == (0, stopped.step), finished.message
    near_files, far_files = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "output").iterdir()} for name in ("near", "far")
    )
    assert near_files.keys() == far_files.keys()
    # Where the data came from differs, and with it the job's digest and the card.
    named = {"finetune.json", "README.md"}
    assert all(near_files[name] == far_files[name] for name in near_files.keys() - named)
