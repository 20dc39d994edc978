"""Whole runs: how they end, and what they refuse."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_crds.verdict import ExitCode
from finetune_trainer import setup, train
from finetune_trainer.errors import Diverged, UserError
from finetune_trainer.modelling.models import load_config
from finetune_trainer.reporting.story import Story
from finetune_trainer.results.checkpoints import Checkpoints
from finetune_trainer.results.journal import Journal

from . import tiny
from .runs import finish, loaded, run

QUICK: dict[str, Any] = {"maxSteps": 6, "batchSize": 4, "learningRate": "1e-2", "sequenceLength": 256}


def chat_job(tmp_path: Path, folder: Path, /, **spec: Any) -> Any:
    data = tiny.write_rows(tmp_path / "train.jsonl", tiny.chat_rows(30))
    return tiny.job(tmp_path, folder, data, **{"training": QUICK, **spec})


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
    assert all(torch.equal(view, weights[name]) for name, view in loaded.masters.trained().items())
    assert torch.isfinite(loaded.masters.weights).all()

    verdict = run(job, tmp_path / "again", run_id="again")  # and again from the checkpoint, which is whole
    assert (verdict.code, verdict.first_step, verdict.step) == (ExitCode.DIVERGED, state.step, state.step)
    assert not (tmp_path / "output").exists()


def test_each_weight_begins_where_every_kernel_takes_it(tmp_path: Path, llama: Path) -> None:
    """In fp32 the model computes with views of the vector, and some kernels of GPUs refuse other addresses."""
    masters = loaded(chat_job(tmp_path, llama, method={"full": {}}), tmp_path).masters
    starts = [view.storage_offset() for _, view in masters.trained().items()]
    assert len(starts) > 10 and not any(start % 256 for start in starts)
    assert len(masters) == sum(view.numel() for view in masters.trained().values()) < len(masters.weights)


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
    assert "'gpt_neox' are not supported; supported for text-generation are gemma, " in verdict.message


def test_a_family_without_a_head_for_scores_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    AutoConfig.for_model("olmoe").save_pretrained(tmp_path / "model")
    spec = chat_job(tmp_path, tmp_path / "model", objective={"reward": {}}).spec
    with pytest.raises(
        UserError, match="objective reward trains a head of text-classification: models of type 'olmoe'"
    ):
        load_config(spec, tmp_path / "model")


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
