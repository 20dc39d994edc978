"""Whole runs: how they end, what they leave, and what they refuse."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_crds.verdict import ExitCode
from finetune_trainer import setup, train
from finetune_trainer.errors import Diverged
from finetune_trainer.reporting.story import Story
from finetune_trainer.results.checkpoints import Checkpoints
from finetune_trainer.results.journal import Journal
from finetune_trainer.storage.stores import VolumeFolder

from . import tiny
from .runs import finish, opened_as_its_card_says, run

QUICK: dict[str, Any] = {"maxSteps": 6, "batchSize": 4, "learningRate": "1e-2", "sequenceLength": 256}


def chat_job(tmp_path: Path, folder: Path, /, **spec: Any) -> Any:
    data = tiny.write_rows(tmp_path / "train.jsonl", tiny.chat_rows(30))
    return tiny.job(tmp_path, folder, data, **{"training": QUICK, **spec})


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


@pytest.mark.parametrize("switch", ["useDora", "useRslora"])
def test_dora_and_rslora(tmp_path: Path, llama: Path, switch: str) -> None:
    job = chat_job(tmp_path, llama, method={"lora": {"rank": 4, switch: True}})
    verdict = finish(job, tmp_path)
    assert verdict.output and verdict.output.servable_by == ([] if switch == "useDora" else ["vllm"])
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "output")


def test_a_model_with_capped_logits_is_refused(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model", "gemma3_text", final_logit_softcapping=30.0)
    verdict = run(chat_job(tmp_path, model), tmp_path)
    assert verdict.code == ExitCode.USER_ERROR
    assert "final_logit_softcapping" in verdict.message


def test_bf16_trains_masters_in_fp32(tmp_path: Path, llama: Path) -> None:
    """At an update of 1e-6 a bf16 weight does not move; its master does."""
    job = chat_job(
        tmp_path,
        llama,
        method={"full": {}},
        training=QUICK | {"precision": "bf16", "learningRate": "1e-6", "maxSteps": 2},
    )
    finish(job, tmp_path)
    ours, base = load_file(tmp_path / "output/model.safetensors"), load_file(llama / "model.safetensors")
    moved = torch.cat([(ours[name] != base[name]).flatten() for name in base])
    assert ours["model.norm.weight"].dtype == torch.float32
    assert moved.float().mean() > 0.9


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


def nan_model(folder: Path) -> Path:
    """A model that knows everything but Z, whose embedding is not a number."""
    tiny.make_model(folder, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    token = tiny.tokenizer()("Z")["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(folder)
    return folder


def test_nan_stops_the_run_and_touches_nothing(tmp_path: Path) -> None:
    model = nan_model(tmp_path / "model")
    rows = tiny.chat_rows(30)
    rows[6]["messages"][0]["content"] += " Z"
    data = tiny.write_rows(tmp_path / "train.jsonl", rows)
    job = tiny.job(
        tmp_path,
        model,
        data,
        training=QUICK | {"maxSteps": 30, "batchSize": 1, "packing": False},
        checkpoints={"everySteps": 1},
    )
    context = tiny.context(job, tmp_path / "scratch")
    story = Story(context.reporter, 1)
    reading = setup.read(job.spec, context)
    loaded = setup.load(reading, context.ranks)
    checkpoints = Checkpoints(
        context.checkpoints, job, context.ranks, attempt=1, run_id="run", keep=2, scratch=tmp_path
    )
    journal = Journal(tmp_path / "journal")
    state = train.resume(loaded, checkpoints, journal, context.ranks, reading.inputs)
    with pytest.raises(
        Diverged, match=r"train.jsonl row 7 is not finite in step \d+; nothing of it was applied"
    ) as raised:
        train.train(loaded, state, checkpoints, journal, context, story, reading.inputs)
    assert state.step > 0 and f"step {state.step + 1}" in str(raised.value)
    assert checkpoints.latest and checkpoints.latest.index.state.step == state.step
    weights = dict(checkpoints.weights(checkpoints.latest))
    assert all(torch.equal(view, weights[name]) for name, view in loaded.masters.named(loaded.masters.weights))
    assert torch.isfinite(loaded.masters.weights).all()

    verdict = run(job, tmp_path / "again", run_id="again")  # and again from the checkpoint, which is whole
    assert (verdict.code, verdict.first_step, verdict.step) == (ExitCode.DIVERGED, state.step, state.step)
    assert not (tmp_path / "output").exists()


def test_a_stop_saves_and_the_next_run_goes_on(tmp_path: Path, llama: Path) -> None:
    job = chat_job(tmp_path, llama)
    stopped = run(job, tmp_path, reporter=tiny.Recorder(stop_at=3))
    assert stopped.code == ExitCode.STOPPED
    assert stopped.checkpoints and stopped.checkpoints.latest and stopped.checkpoints.latest.step == stopped.step < 6
    assert "Suspended" in stopped.message
    assert not (tmp_path / "output").exists()
    finished = run(job, tmp_path, run_id="second")
    assert (finished.code, finished.first_step, finished.step) == (0, stopped.step, 6)


def test_a_stop_in_mid_evaluation_is_not_lost(tmp_path: Path, llama: Path) -> None:
    """What was not evaluated before the stop is evaluated after it, and a best found then is committed over the plain checkpoint."""
    spec = {"dataset": {"evaluation": {"fraction": "0.3"}}, "evaluation": {"everySteps": 3}}
    whole = chat_job(tmp_path / "whole", llama, **spec)
    finish(whole, tmp_path / "whole")

    class StopsInEvaluation(tiny.Recorder):
        def update(self, report: Any, metrics: Any) -> None:
            if report.stage == "Evaluating" and report.step == 3:
                self.stop_requested = "Suspended"

    job = chat_job(tmp_path / "stopped", llama, **spec)
    stopped = run(job, tmp_path / "stopped", reporter=StopsInEvaluation())
    assert (stopped.code, stopped.step) == (ExitCode.STOPPED, 3)
    finished = run(job, tmp_path / "stopped", run_id="second")
    assert (finished.code, finished.first_step) == (0, 3)
    assert tiny.losses(tmp_path / "stopped/output", "eval_loss_hex") == tiny.losses(
        tmp_path / "whole/output", "eval_loss_hex"
    )


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
    verdict = train.run(job, dataclasses.replace(context, output=Elsewhere(tmp_path / "output")) if far else context)
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


def test_a_replaced_run_commits_nothing(tmp_path: Path, llama: Path) -> None:
    job = chat_job(tmp_path, llama, checkpoints={"everySteps": 2})

    class Replaced(tiny.Recorder):
        def update(self, report: Any, metrics: Any) -> None:
            if report.step == 3 and report.stage == "Training":
                owner = next(tmp_path.rglob("owner.json"))
                owner.write_text('{"attempt": 1, "runId": "another"}')

    verdict = run(job, tmp_path, reporter=Replaced())
    assert verdict.code == ExitCode.FENCED
    assert [path.parent.name for path in tmp_path.rglob("step-*/index.json")] == ["step-00000002"]


def test_an_earlier_attempt_is_refused(tmp_path: Path, llama: Path) -> None:
    job = chat_job(tmp_path, llama)
    assert run(job, tmp_path, attempt=2, reporter=tiny.Recorder(stop_at=2)).code == ExitCode.STOPPED
    assert run(job, tmp_path, attempt=1, run_id="late").code == ExitCode.FENCED


def test_a_changed_dataset_is_refused(tmp_path: Path, llama: Path) -> None:
    job = chat_job(tmp_path, llama)
    assert run(job, tmp_path, reporter=tiny.Recorder(stop_at=2)).code == ExitCode.STOPPED
    tiny.write_rows(tmp_path / "train.jsonl", tiny.chat_rows(29))
    verdict = run(job, tmp_path, run_id="second")
    assert verdict.code == ExitCode.DATA_ERROR
    assert verdict.message.startswith("DatasetChanged")


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "index"])
def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, llama: Path, harm: str) -> None:
    job = chat_job(tmp_path, llama, checkpoints={"everySteps": 2})
    stopped = run(job, tmp_path, reporter=tiny.Recorder(stop_at=4))
    folder = max(path for path in tmp_path.rglob("step-*") if path.is_dir())
    assert int(folder.name[5:]) == stopped.step
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    match harm:
        case "flip":
            data[-7] ^= 1
            shard.write_bytes(data)
        case "cut":
            shard.write_bytes(data[:-1])
        case "remove":
            shard.unlink()
        case "index":
            (folder / "index.json").write_text("{")
    verdict = run(job, tmp_path, run_id="second")
    assert verdict.code == 0, verdict.message
    assert 0 < verdict.first_step < stopped.step
    assert verdict.step == 6


def test_early_stopping_publishes_the_best(tmp_path: Path, llama: Path) -> None:
    job = chat_job(
        tmp_path, llama,
        dataset={"evaluation": {"fraction": "0.3"}},
        training=QUICK | {"maxSteps": 200, "learningRate": "5e-2"},
        evaluation={"everySteps": 2, "earlyStopping": {"patience": 2}},
    )  # fmt: skip
    verdict = finish(job, tmp_path)
    assert verdict.step == verdict.total_steps < 200
    values = [float.fromhex(value) for value in tiny.losses(tmp_path / "output", "eval_loss_hex")[1:]]
    best = 2 * (values.index(min(values)) + 1)
    assert verdict.step == best + 4
    assert verdict.output and verdict.output.step == best
    assert verdict.checkpoints and verdict.checkpoints.best and verdict.checkpoints.best.step == best
    after = {metric.name: metric.value for metric in (verdict.evaluation and verdict.evaluation.after) or []}
    assert after["eval_loss"] == f"{min(values):.6g}"
    saved = load_file(tmp_path / "output/adapter_model.safetensors")
    weights = load_file(next(tmp_path.glob(f"output.checkpoints/*/*/step-{best:08d}/*.safetensors")))
    for name, tensor in saved.items():
        assert torch.equal(tensor, weights["weight/" + name.replace(".weight", ".default.weight")])


USER_ERRORS: dict[str, tuple[dict[str, Any], ExitCode, str]] = {
    "targets": ({"method": {"lora": {"targets": ["q_proj", "banana"]}}}, ExitCode.USER_ERROR, "method.lora.targets: banana"),
    "head": ({"method": {"lora": {"targets": ["lm_head"]}}}, ExitCode.USER_ERROR, "lm_head"),
    "too long": ({"training": QUICK | {"sequenceLength": 4096}}, ExitCode.USER_ERROR, "exceeds the 1024 positions"),
    "few tokens": ({"training": {"tokensPerStep": 8, "maxSteps": 1}}, ExitCode.USER_ERROR, "training.tokensPerStep 8"),
    "cut answers": ({"training": QUICK | {"sequenceLength": 16}}, ExitCode.DATA_ERROR, "have no token to learn"),
    "columns": ({"dataset": {"format": "instruction"}}, ExitCode.DATA_ERROR, "row 1: no column 'prompt'"),
    "task": ({"task": "text-classification"}, ExitCode.DATA_ERROR, "no column"),
    "all held out": ({"dataset": {"evaluation": {"fraction": "1"}}}, ExitCode.DATA_ERROR, "none is left to train on"),
    "no model": ({"model": {"uri": "file:///nowhere/model"}}, ExitCode.USER_ERROR, "/nowhere/model"),
    "no adapter": ({"model": {"adapter": {"uri": "file:///usr"}}}, ExitCode.USER_ERROR, "spec.model.adapter"),
}  # fmt: skip


@pytest.mark.parametrize("case", USER_ERRORS)
def test_mistakes_are_named(tmp_path: Path, llama: Path, case: str) -> None:
    spec, code, sentence = USER_ERRORS[case]
    verdict = run(chat_job(tmp_path, llama, **spec), tmp_path)
    assert sentence in verdict.message
    assert verdict.code == code
    words = set(verdict.message.replace(",", " ").split()) - {"one", "two", "three"}
    assert not words & set(tiny.WORDS), "no word of a row"


def test_an_unknown_family_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model", "gpt_neox", num_key_value_heads=None, head_dim=None)
    verdict = run(chat_job(tmp_path, model), tmp_path)
    assert verdict.code == ExitCode.USER_ERROR
    assert "'gpt_neox' are not supported; supported are bart, bert" in verdict.message


class Elsewhere(VolumeFolder):
    """A store that is no folder of this machine as far as the trainer can tell: it goes the way of S3."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"s3://bucket/{folder.name}", folder)
        self.local = None


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
            "checkpoints": Elsewhere(tmp_path / "far/output.checkpoints"),
            "output": Elsewhere(tmp_path / "far/output"),
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
    # Where the data came from differs, and with it the job's digest.
    assert all(near_files[name] == far_files[name] for name in near_files if name != "finetune.json")


def test_checkpoints_by_the_clock(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs 3,000 times as fast: several saves of everyMinutes: 1 in a run of six steps."""
    real = time.monotonic
    monkeypatch.setattr(train.time, "monotonic", lambda: real() * 3000)
    job = chat_job(tmp_path, llama, checkpoints={"everyMinutes": 1, "keep": 9})
    finish(job, tmp_path)
    steps = sorted(int(path.parent.name[5:]) for path in tmp_path.rglob("step-*/index.json"))
    assert steps[-1] == 6 and len(steps) > 1


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path, llama: Path) -> None:
    """Nothing moves, so the first evaluation stays the best."""
    job = chat_job(
        tmp_path, llama,
        dataset={"evaluation": {"fraction": "0.3"}},
        training=QUICK | {"maxSteps": 30, "learningRate": "0"},
        evaluation={"everySteps": 5, "publish": "last"},
        checkpoints={"everySteps": 3, "keep": 2},
    )  # fmt: skip
    verdict = run(job, tmp_path)
    assert verdict.checkpoints and verdict.checkpoints.best
    best = verdict.checkpoints.best.step
    steps = {int(path.parent.name[5:]) for path in tmp_path.rglob("step-*/index.json")}
    assert best == 5
    assert steps == {best, 27, 30}
    assert verdict.output and verdict.output.step == 30


def worker_says(tmp_path: Path, job: Any, *modules: str) -> tuple[int, list[str], str]:
    """Exit code of a worker in a process of its own, which of the modules it had imported in the end, and its log."""
    (tmp_path / "job.json").write_text(job.model_dump_json(by_alias=True))
    code = f"import sys; from finetune_trainer import worker; print(worker.main(), *(name for name in {modules} if sys.modules.get(name)))"
    environment = {
        **os.environ,
        "FINETUNE_JOB_FILE": str(tmp_path / "job.json"),
        "FINETUNE_ROOT": str(tmp_path / "root"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    number, *imported = done.stdout.split()
    return int(number), imported, done.stderr


def test_nothing_slow_is_imported(tmp_path: Path, llama: Path) -> None:
    """trl, lm-evaluation-harness, datasets and scikit-learn cost seconds, and are on no way to the first step of a job without benchmarks."""
    slow = ("trl", "lm_eval", "datasets", "bitsandbytes", "sklearn", "pandas", "obstore", "celpy", "pyarrow")
    code, imported, log = worker_says(tmp_path, chat_job(tmp_path, llama, checkpoints={"everySteps": 100}), *slow)
    assert (code, imported) == (0, []), log


def test_that_there_is_no_gpu_is_told_before_the_slow_imports(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    job = chat_job(tmp_path, llama, resources={"gpusPerNode": 1})
    code, imported, _ = worker_says(tmp_path, job, "torch", "transformers")
    assert (code, imported) == (ExitCode.USER_ERROR, [])
