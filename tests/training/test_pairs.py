"""Summarization and translation with models that read one text and write another: T5 and BART."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import sacrebleu
import torch
from safetensors.torch import load_file
from torchmetrics.text import ROUGEScore
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from finetune_crds.verdict import ExitCode
from finetune_trainer import setup
from finetune_trainer.data.order import Batching, Order
from finetune_trainer.objectives.pairs import Summaries, Translations

from . import reference, tiny
from .runs import assert_same_logits, finish, journal, loaded, opened_as_its_card_says, prepared, run, trained
from .spawn import run_ranks
from .test_methods import FEW
from .variants import VARIANTS

ROWS = tiny.pair_rows(40)
FAMILIES = ("bart", "t5", "t5-gated")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family."""
    folder = tmp_path_factory.mktemp("pairs")
    return {family: tiny.make_model(folder / family, family) for family in FAMILIES}


def make(folder: Path, model: Path, task: str = "summarization", /, **spec: Any) -> Any:
    """A job of eight steps that is evaluated on what it trains on."""
    data = tiny.write_rows(folder / "train.jsonl", spec.pop("rows", ROWS[:12]))
    training = {"maxSteps": 8, "batchSize": 6, "microBatchSize": 4, "learningRate": "1e-2"} | spec.pop("training", {})
    dataset = {"evaluation": {"sources": [{"uri": f"file://{data}"}]}} | spec.pop("dataset", {})
    evaluation = {"maxNewTokens": 3} | spec.pop("evaluation", {})
    return tiny.job(
        folder, model, data, task=task, training=training, dataset=dataset, evaluation=evaluation, **spec
    )  # fmt: skip


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_those_of_the_reference(tmp_path: Path, models: dict[str, Path], family: str, method: str) -> None:
    """Ten steps of ragged rows, accumulated in micro-batches that do not divide them, with clipping, decay and warm-up."""
    chosen: dict[str, Any] = {"lora": {"rank": 4, "alpha": 8}} if method == "lora" else {"full": {}}
    training = {"epochs": "2", "batchSize": 8, "microBatchSize": 3, "learningRate": "5e-3", "sequenceLength": 128,
                "warmupSteps": 2, "weightDecay": "0.1", "maxGradNorm": "0.5"}  # fmt: skip
    data = tiny.write_rows(tmp_path / "train.jsonl", ROWS)
    job = tiny.job(tmp_path, models[family], data, task="translation", method=chosen, training=training)
    finish(job, tmp_path)
    rows = prepared(tmp_path)
    order = Order(np.arange(40), rows.lengths, rows.sources, None, 42, Batching(128, False, 8))
    steps = [[int(i) for sequence in step for i in sequence] for epoch in (0, 1) for step in order.epoch(epoch)]

    def adapt(model: Any) -> Any:
        if method == "full":
            return model
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
        return peft.get_peft_model(model, config)

    losses, norms, trained = reference.train(
        models[family], ROWS, steps, adapt=adapt, seed=42, rate=5e-3, decay=0.1, clip=0.5, micro_batch=3,
        kind=reference.PAIRS,
    )  # fmt: skip
    lines = journal(tmp_path)
    assert len(lines) == len(steps) == 10
    assert losses[-1] < losses[0] - 0.02, "the reference itself must learn, or equality says little"
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], norms, rtol=2e-4)
    ours = load_file(tmp_path / "output" / ("adapter_model.safetensors" if method == "lora" else "model.safetensors"))
    for name, tensor in trained.items():
        if name.endswith("k_proj.bias"):
            continue  # all scores of a query move alike, so its gradient is nothing, and AdamW's steps are those of what rounding leaves
        torch.testing.assert_close(ours[name.replace(".default", "")], tensor.detach(), rtol=0, atol=2e-4)


@pytest.mark.parametrize(("family", "method"), [("bart", "lora"), ("t5", "ia3"), ("t5-gated", "qlora")])
def test_a_merged_model_computes_what_was_trained(
    tmp_path: Path, models: dict[str, Path], family: str, method: str
) -> None:
    output = {"uri": f"file://{tmp_path}/output", "merged": True}
    job = make(tmp_path, models[family], method=VARIANTS[method], output=output, **FEW)
    made = trained(job, tmp_path)
    record = json.loads((tmp_path / "output/finetune.json").read_text())
    assert (record["format"], record["servable_by"]) == ("transformers", [])
    opened = opened_as_its_card_says(tmp_path / "output")
    assert not any(hasattr(module, "lora_A") for module in opened.modules())
    assert_same_logits(made, opened, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_unfreezes_from_the_head_through_the_decoder_to_the_encoder(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    """An untied head begins alone with the decoder's norm; the encoder's norm comes with its last block, the embeddings last."""
    job = make(tmp_path, models[family], method=VARIANTS["gradualUnfreezing"])
    groups = loaded(job, tmp_path).masters.groups
    blocks = "layers" if family == "bart" else "block"
    stages = [f"{part}.{blocks}.{i}." for part in ("decoder", "encoder") for i in (1, 0)]
    inside = [{stage for stage in stages for name in group.names if stage in name} for group in groups]
    assert inside == [*([set()] if family == "t5-gated" else []), *({stage} for stage in stages), set()]
    names = [set(group.names) for group in groups]
    head = "decoder.final_layer_norm.weight"
    if family == "t5-gated":
        assert names[0] == {"lm_head.weight", head}
    if family == "t5":
        assert head in names[0] and "encoder.final_layer_norm.weight" in names[2]
    if family != "bart":
        assert names[-1] == {"shared.weight"}
    assert all("embed" in name or "shared" in name for name in names[-1])


@pytest.mark.parametrize("task", ["summarization", "translation"])
def test_it_is_measured_by_what_it_writes(tmp_path: Path, models: dict[str, Path], task: str) -> None:
    """The published model writes with the plain library what was measured; its metric chooses the best, and samples are answered."""
    prefix = "shorten: "
    rows = [{"source": word, "target": " ".join([word] * 4)} for word in ("red", "one", "two")]
    job = make(
        tmp_path, models["bart"], task, method={"full": {}}, rows=rows,
        dataset={"prefix": prefix}, training={"maxSteps": 60, "batchSize": 3, "learningRate": "3e-3"},
        evaluation={"everySteps": 30, "maxNewTokens": 20, "metric": "eval_rouge2" if task == "summarization" else "eval_chrf",
                    "prompts": [rows[0]["source"]]},
    )  # fmt: skip
    verdict = finish(job, tmp_path)
    before, after = (
        {metric.name: float(metric.value) for metric in metrics}
        for metrics in (verdict.evaluation.before, verdict.evaluation.after)
    )
    output = tmp_path / "output"
    assert f"`{prefix}`" in (output / "README.md").read_text()
    model, tokenizer = opened_as_its_card_says(output), AutoTokenizer.from_pretrained(output)
    written = []
    for row in rows:
        asked = tokenizer(prefix + row["source"], return_tensors="pt")
        (tokens,) = model.generate(**asked, max_new_tokens=20, num_beams=1, do_sample=False)
        written.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    meant = [row["target"] for row in rows]
    if task == "summarization":
        rouge = ROUGEScore(rouge_keys=("rouge1", "rouge2", "rougeL"))(written, meant)
        expected = {f"eval_{name}": float(rouge[f"{name}_fmeasure"]) for name in ("rouge1", "rouge2", "rougeL")}
    else:
        expected = {
            "eval_chrf": sacrebleu.corpus_chrf(written, [meant]).score,
            "eval_bleu": sacrebleu.corpus_bleu(written, [meant]).score,
        }
    assert after.keys() == before.keys() == {"eval_loss", *expected}
    for name, value in expected.items():
        assert math.isclose(after[name], value, rel_tol=1e-5), name
        assert value > before[name] + 0.1
    answers = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [answer["when"] for answer in answers] == ["before", "during", "after"]
    assert answers[-1]["answer"] == written[0] != answers[0]["answer"]


def test_measures_do_not_depend_on_how_texts_are_batched() -> None:
    """Added up one by one, all at once, and as the libraries compute them of the whole; an empty answer counts too."""
    written = ["the cat sat on the mat", "a door", "", "one two three four five"]
    meant = ["the cat is on the mat", "a red door", "a stone", "one two three four six"]
    for kind in (Summaries, Translations):
        single, whole = kind(), kind()
        for one, other in zip(written, meant, strict=True):
            single.add_texts([one], [other])
        whole.add_texts(written, meant)
        assert single.metrics() == pytest.approx(whole.metrics(), rel=1e-6)
    assert whole.metrics()["eval_bleu"] == pytest.approx(sacrebleu.corpus_bleu(written, [meant]).score)
    assert whole.metrics()["eval_chrf"] == pytest.approx(sacrebleu.corpus_chrf(written, [meant]).score)


def test_evaluation_depends_neither_on_batches_nor_on_ranks(tmp_path: Path, models: dict[str, Path]) -> None:
    """One step that takes every row, so that the model is the same too."""
    found = {}
    for size, world in ((1, 1), (5, 2)):
        folder = tmp_path / f"{size}-{world}"
        training = {"maxSteps": 1, "batchSize": 12, "microBatchSize": size, "warmupSteps": 0}
        job = make(folder, models["t5-gated"], "translation", method={"full": {}}, training=training)
        verdict = run_ranks(job, folder, world)
        assert verdict.code == 0, verdict.message
        found[folder.name] = [
            line[name]
            for line in journal(folder)
            if "eval_loss" in line
            for name in ("eval_loss", "eval_chrf", "eval_bleu")
        ]
    first = found["1-1"]
    assert len(first) == 6 and first[3] < first[0] - 0.01
    for numbers in found.values():
        np.testing.assert_allclose(numbers, first, rtol=1e-5)


LIMITS = {"source": (60, 6, 25, 7), "target": (4, 60, 5, 27), "both": (60, 60, 16, 16), "neither": (10, 6, 11, 7)}


@pytest.mark.parametrize("case", LIMITS)
def test_a_long_row_loses_its_source_first_and_never_an_end(tmp_path: Path, models: dict[str, Path], case: str) -> None:
    source, target, kept_of_source, kept_of_target = LIMITS[case]
    rows = [{"source": "s" * source, "target": "t" * target}, {"source": "a", "target": "b"}]
    job = make(tmp_path, models["t5"], rows=rows, training={"sequenceLength": 32})
    found = setup.read(job.spec, tiny.context(job, tmp_path / "scratch")).rows
    row = found.tokens[: found.offsets[1]]
    assert (found.splits[0], len(row)) == (kept_of_source, kept_of_source + kept_of_target)
    assert (row[kept_of_source - 1], row[-1]) == (2, 2)
    assert found.targets[0] == found.learned[: len(row)].sum() == kept_of_target
    assert found.truncated.sum() == (2 if case != "neither" else 0)  # it is trained on and evaluated on
    assert found.note(0).decode() == rows[0]["target"]


MISTAKES: dict[str, tuple[dict[str, Any], ExitCode, str]] = {
    "answers too long": ({"evaluation": {"maxNewTokens": 300}}, ExitCode.USER_ERROR, "evaluation.maxNewTokens 300 exceeds the 256 positions"),
    "rows too long": ({"training": {"sequenceLength": 300}}, ExitCode.USER_ERROR, "training.sequenceLength 300 exceeds the 256 positions"),
    "languages": ({"rows": [{"translation": {"en": "red", "de": "rot"}}]}, ExitCode.DATA_ERROR, "row 1: column 'translation' holds en, de: name two of them"),
    "no target": ({"rows": [{"source": "red"}]}, ExitCode.DATA_ERROR, "row 1: no column 'target'"),
    "embedding in an adapter": (
        {"method": {"lora": {"modulesToSave": ["shared"], "targets": ["q_proj"]}}}, ExitCode.USER_ERROR, "method.lora.modulesToSave: the head of"
    ),
    "embedding of the encoder": (
        {"method": {"lora": {"modulesToSave": ["encoder.embed_tokens"], "targets": ["q_proj"]}}}, ExitCode.USER_ERROR,
        "the weights of model.encoder.embed_tokens are those of",
    ),
    "head": ({"method": {"freeze": {"trainHead": True}}}, ExitCode.USER_ERROR, "method.freeze.trainHead"),
    "prompt": ({"method": {"prompt": {}}}, ExitCode.USER_ERROR, "not with prompt"),
    "task": ({"task": "text-generation"}, ExitCode.USER_ERROR, "are supported for summarization, translation, not for text-generation"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(tmp_path: Path, models: dict[str, Path], case: str) -> None:
    given, code, sentence = MISTAKES[case]
    spec = dict(given)
    task = spec.pop("task", "summarization")
    verdict = run(make(tmp_path, models["bart"], task, **spec), tmp_path)
    assert sentence in verdict.message
    assert verdict.code == code


def test_a_model_that_names_no_start_is_refused(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model", "t5")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"decoder_start_token_id": None}))
    verdict = run(make(tmp_path, model), tmp_path)
    assert verdict.code == ExitCode.USER_ERROR and "decoder_start_token_id" in verdict.message


def test_what_is_frozen_keeps_every_bit(tmp_path: Path, models: dict[str, Path]) -> None:
    """Also where it computes in a coarser type, and BART's buffer, which is no weight."""
    spec = {"method": {"freeze": {"trainLastBlocks": 1}}, "training": {"precision": "bf16", "maxSteps": 2}}
    finish(make(tmp_path, models["bart"], **spec), tmp_path)
    ours, base = (load_file(place / "model.safetensors") for place in (tmp_path / "output", models["bart"]))
    assert ours.keys() == base.keys() and "final_logits_bias" in ours
    moved = {name for name in base if not torch.equal(ours[name], base[name])}
    assert moved == {name for name in base if "decoder.layers.1." in name}
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "output").final_logits_bias.abs().sum() > 0
