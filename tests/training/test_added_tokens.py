"""model.addTokens: the tokenizer has them, their rows begin as what stood for them and are trained, and what is published opens with both."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from finetune_crds.verdict import ExitCode

from . import reference, tiny
from .runs import (
    EVERY_3,
    assert_same_logits,
    finish,
    held_out_losses,
    journal,
    loaded,
    opened_as_its_card_says,
    prepared,
    resumed,
    run,
)
from .test_methods import RATES, labelled_rows
from .test_parity import lora, order_of

NEW = ["<red>", "stone"]
IDS = [259, 260]


def chats(count: int) -> list[dict[str, Any]]:
    rows = tiny.chat_rows(count)
    for row in rows:
        for message in row["messages"]:
            message["content"] = message["content"].replace("red", "<red>")
    return rows


def make(folder: Path, model: Path, task: str, method: dict[str, Any], /, **spec: Any) -> Any:
    writes = task == "text-generation"
    rows: Any = chats(12) if writes else labelled_rows()
    data = tiny.write_rows(folder / "train.jsonl", rows)
    training = {
        "maxSteps": 8,
        "batchSize": 6,
        "microBatchSize": 2,
        "learningRate": RATES.get(next(iter(method)), "1e-2"),
    } | ({"sequenceLength": 512} if writes else {})
    dataset = {"evaluation": {"sources": [{"uri": f"file://{data}"}]}}
    spec = {"model": {"addTokens": {"tokens": NEW}}, **spec, "training": training | spec.get("training", {})}
    return tiny.job(folder, model, data, task=task, method=method, dataset=dataset, **spec)


def test_losses_are_those_of_peft(tmp_path: Path, llama: Path) -> None:
    """A tied head: the reference trains the rows by peft's trainable_token_indices, from a model that was grown by hand."""
    grown = tmp_path / "grown"
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(llama)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    parts = [tokenizer(token)["input_ids"] for token in NEW]
    tokenizer.add_tokens(NEW)
    model.resize_token_embeddings(261, mean_resizing=False)
    weight = model.get_input_embeddings().weight.data
    for row, ids in zip(IDS, parts, strict=True):
        weight[row] = weight[ids].mean(dim=0)
    model.save_pretrained(grown)
    tokenizer.save_pretrained(grown)

    rows = chats(24)
    training = {"epochs": "2", "batchSize": 6, "microBatchSize": 4, "learningRate": "5e-3", "sequenceLength": 512,
                "packing": False, "warmupSteps": 2, "weightDecay": "0.1", "maxGradNorm": "0.5"}  # fmt: skip
    job = tiny.job(
        tmp_path, llama, tiny.write_rows(tmp_path / "rows.jsonl", rows), method={"lora": {"rank": 4, "alpha": 8}}, training=training,
        model={"addTokens": {"tokens": NEW}},
    )  # fmt: skip
    finish(job, tmp_path)
    order = order_of(prepared(tmp_path), 6, seed=42)
    steps = [[int(i) for sequence in step for i in sequence] for epoch in (0, 1) for step in order.epoch(epoch)]
    losses, norms, trained = reference.train(
        grown, [row["messages"] for row in rows], steps, adapt=lora(trainable_token_indices={"embed_tokens": IDS}), seed=42, rate=5e-3,
        decay=0.1, clip=0.5, micro_batch=4,
    )  # fmt: skip
    lines = journal(tmp_path)
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], norms, rtol=2e-4)
    (ours,) = (
        tensor for name, tensor in load_file(tmp_path / "output/adapter_model.safetensors").items() if "tokens" in name
    )
    (theirs,) = (tensor.detach() for name, tensor in trained.items() if "tokens" in name)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    assert not torch.equal(ours, weight[IDS])


CASES = [
    ("llama", True, "text-generation", "lora", False), ("llama", False, "text-generation", "lora", True), ("llama", True, "text-generation", "lora", True),
    ("llama", False, "text-generation", "qlora", False), ("llama", True, "text-generation", "qlora", True), ("llama", False, "text-generation", "full", False),
    ("llama", True, "text-generation", "gradualUnfreezing", False), ("gpt2", True, "text-generation", "lora", False),
    ("bert", True, "text-classification", "lora", False),
]  # fmt: skip


@pytest.mark.parametrize(("family", "tied", "task", "method", "merged"), CASES)
def test_it_learns_resumes_and_opens_as_its_card_says(
    tmp_path: Path, family: str, tied: bool, task: str, method: str, merged: bool
) -> None:
    shape = {} if family == "bert" else {"tie_word_embeddings": tied}
    model = tiny.make_model(tmp_path / "model", family, **shape)
    base = load_file(model / "model.safetensors")
    settings = {"everySteps": 2} if method == "gradualUnfreezing" else {}
    rate = {"training": {"learningRate": "2e-3"}} if family == "bert" else {}

    output = {"uri": f"file://{tmp_path}/output", **({"merged": True} if merged else {})}
    job = make(tmp_path, model, task, {method: settings}, output=output, checkpoints=EVERY_3, **rate)
    made = resumed(job, tmp_path, 3)
    before, after = held_out_losses(tmp_path)
    assert after < before - 0.005
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "output")
    assert tokenizer("<red>", add_special_tokens=False)["input_ids"] == IDS[:1]
    opened = opened_as_its_card_says(tmp_path / "output")
    assert opened.get_input_embeddings().weight.shape[0] == 261
    assert (made.rows.tokens == IDS[1]).any()
    assert_same_logits(made, opened, tmp_path)
    if method in ("lora", "qlora") and merged:  # only the new rows have moved
        (name,) = (
            name for name in base if name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
        )
        ours = load_file(tmp_path / "output/model.safetensors")[name]
        assert torch.equal(ours[:259], base[name])


def test_rows_that_a_vocabulary_was_padded_with_are_taken_first(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "model", vocab_size=320)
    job = make(tmp_path, folder, "text-generation", {"lora": {}})
    made = loaded(job, tmp_path)
    assert made.model.rows is None and made.model.inner.config.vocab_size == 320
    weight = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    parts = tiny.tokenizer()("<red>")["input_ids"]
    rows = next(parameter for name, parameter in made.model.outer.named_parameters() if "tokens_delta" in name)
    torch.testing.assert_close(rows[0].detach(), weight[parts].mean(dim=0))
    finish(job, tmp_path)
    assert opened_as_its_card_says(tmp_path / "output").get_input_embeddings().weight.shape[0] == 320


def test_tokens_from_a_file(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "tokens.txt").write_text("<red>\nstone\n")
    given = {"addTokens": {"file": {"uri": f"file://{tmp_path}/tokens.txt"}, "special": True}}
    made = loaded(make(tmp_path, llama, "text-generation", {"lora": {}}, model=given), tmp_path)
    assert made.tokenizer.convert_tokens_to_ids(NEW) == IDS
    assert made.tokenizer.decode([*IDS, 50], skip_special_tokens=True) == made.tokenizer.decode([50])


MISTAKES = {
    "there already": (["<|im_end|>"], "model.addTokens.tokens[0]: '<|im_end|>' is a token of file://"),
    "twice": (["<a>", "<b>", "<a>"], "model.addTokens.tokens[2]: '<a>' comes twice; remove one"),
    "blank": (["<a>", " "], "model.addTokens.tokens[1] is empty"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(tmp_path: Path, llama: Path, case: str) -> None:
    tokens, sentence = MISTAKES[case]
    job = make(tmp_path, llama, "text-generation", {"lora": {}}, model={"addTokens": {"tokens": tokens}})
    verdict = run(job, tmp_path)
    assert (verdict.code, sentence in verdict.message) == (ExitCode.USER_ERROR, True), verdict.message


def test_an_adapter_with_tokens_is_not_continued(tmp_path: Path, llama: Path) -> None:
    first = make(tmp_path / "first", llama, "text-generation", {"lora": {}}, training={"maxSteps": 1})
    finish(first, tmp_path / "first")
    given = {"adapter": {"uri": f"file://{tmp_path}/first/output"}}
    job = make(tmp_path / "second", llama, "text-generation", {"lora": {}}, model=given)
    verdict = run(job, tmp_path / "second")
    assert (verdict.code, "brings tokens of its own" in verdict.message) == (ExitCode.USER_ERROR, True), verdict.message
