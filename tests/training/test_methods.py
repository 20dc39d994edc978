"""What each method promises: what it leaves alone, how it begins, that it resumes exactly, and that its output opens with plain libraries."""

import json
import math
import os
import re
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import pytest
import torch
import transformers
from peft.tuners.lora import layer
from safetensors.torch import load_file

from finetune_crds.verdict import ExitCode
from finetune_trainer.methods import quantized
from finetune_trainer.methods.weights import _from_the_head
from finetune_trainer.modelling import anatomy, masters, samples
from finetune_trainer.modelling.masters import Masters

from . import tiny
from .runs import (
    assert_same_logits,
    finish,
    loaded,
    opened_as_its_card_says,
    resumed,
    run,
    same_bytes_when_stopped,
    trained,
)
from .spawn import run_ranks
from .variants import LLAMA, VARIANTS

RATES = {
    "full": "3e-3",
    "freeze": "5e-3",
    "gradualUnfreezing": "5e-3",
    "prefix": "5e-2",
    "prompt": "5e-2",
    "ia3": "5e-2",
}
NOT_HELD_OUT = {"evaluation": {"fraction": "0"}}
FEW = {"training": {"maxSteps": 3}, "dataset": NOT_HELD_OUT}
"""A short run that nothing is measured of."""
TASKS = ("text-generation", "text-classification")
CHATS = 12
"""Rows of text to generate."""


def labelled_rows() -> list[dict[str, str]]:
    return [
        {"text": f"{word} {noise}", "label": "warm" if word in ("red", "iron") else "cold"}
        for word in ("red", "iron", "blue", "river")
        for noise in tiny.WORDS[:8]
    ]


def make(folder: Path, model: Path, task: str, method: dict[str, Any], /, **spec: Any) -> Any:
    """A job of eight steps that is evaluated on what it trains on."""
    rows: Any = tiny.chat_rows(CHATS) if task == "text-generation" else labelled_rows()
    data = tiny.write_rows(folder / "train.jsonl", rows)
    (name,) = method
    rate, size, micro, length = RATES.get(name, "1e-2"), 6, 2, 512
    if task == "text-classification":
        rate = "3e-3" if name in ("full", "freeze", "gradualUnfreezing") else "1e-2"
        size, micro, length = 16, 8, 64
    training = {
        "maxSteps": 8,
        "batchSize": size,
        "microBatchSize": micro,
        "learningRate": rate,
        "sequenceLength": length,
    }
    training |= spec.pop("training", {})
    dataset = {"evaluation": {"sources": [{"uri": f"file://{data}"}]}} | spec.pop("dataset", {})
    return tiny.job(folder, model, data, task=task, method=method, training=training, dataset=dataset, **spec)


def test_a_long_text_keeps_the_token_that_ends_it(tmp_path: Path) -> None:
    folder = tiny.make_encoder(tmp_path / "model")
    job = make(tmp_path, folder, "text-classification", {"full": {}}, training={"sequenceLength": 8})
    rows = loaded(job, tmp_path).rows
    assert int(rows.lengths.max()) == 8 and rows.truncated.any()
    assert {int(rows.tokens[end - 1]) for end in rows.offsets[1:]} == {2}


def test_layers_in_8_bits_forget_what_they_read() -> None:
    """bitsandbytes would keep it until the graph is gone, which is the next step's end; gradients are the same."""
    import bitsandbytes

    gradients, kept = [], []
    for settled in (False, True):
        torch.manual_seed(0)
        layer = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=6.0)
        weight = torch.randn(32, 64)
        layer.weight = bitsandbytes.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False)
        if settled:
            quantized.settle(torch.nn.Sequential(layer))
        given = torch.randn(1, 8, 64, requires_grad=True)
        read = given * 2
        alive = weakref.ref(read)
        loss = layer(read).square().sum()
        del read
        kept.append(alive() is not None)
        loss.backward()
        gradients.append(given.grad)
    assert kept == [True, False]
    assert torch.equal(*gradients)


MERGED = ("lora", "lora-pissa", "lora-dora", "lora-modules", "qlora", "qlora-8", "qlora-dora", "ia3")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", MERGED)
def test_a_merged_model_computes_what_was_trained(tmp_path: Path, llama: Path, task: str, variant: str) -> None:
    """Of quantised weights too: merged into what they dequantise to, not into what they were."""
    output = {"uri": f"file://{tmp_path}/output", "merged": True}
    more = (
        {"targets": ["q_proj", "down_proj"]} if variant == "qlora" else {}
    )  # the other layers are quantised all the same
    ((name, method),) = VARIANTS[variant].items()
    job = make(tmp_path, llama, task, {name: method | more}, output=output, **FEW)
    made = trained(job, tmp_path)
    record = json.loads((tmp_path / "output/finetune.json").read_text())
    assert record["format"] == "transformers"
    assert record["servable_by"] == (["vllm"] if task == "text-generation" else [])
    model = opened_as_its_card_says(tmp_path / "output")
    assert not any(hasattr(module, "lora_A") for module in model.modules())
    assert_same_logits(made, model, tmp_path)
    assert (tmp_path / "output/adapter/adapter_config.json").is_file()


def test_a_resume_on_a_processor_that_begins_otherwise_is_refused(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PiSSA draws at random to find components, and another kind of GPU draws otherwise: what is frozen would be another model."""
    job = make(tmp_path, llama, "text-generation", VARIANTS["lora-pissa"])
    stopped = run(job, tmp_path, reporter=tiny.Recorder(stop_at=3))
    assert stopped.code == ExitCode.STOPPED
    plain = layer.svd_lowrank

    def drawn_otherwise(*arguments: Any, **options: Any) -> Any:
        torch.rand(7)
        return plain(*arguments, **options)

    monkeypatch.setattr(layer, "svd_lowrank", drawn_otherwise)
    verdict = run(job, tmp_path, run_id="second")
    assert verdict.code == ExitCode.USER_ERROR
    assert "computes other factors" in verdict.message


@pytest.mark.parametrize("variant", LLAMA)
def test_a_changed_neighbour_changes_no_bit(tmp_path: Path, llama: Path, variant: str) -> None:
    """Rows packed into one sequence do not see each other, whatever is trained."""
    made = loaded(make(tmp_path, llama, "text-generation", VARIANTS[variant]), tmp_path)
    made.masters.weights.add_(0.1 * torch.randn(made.masters.weights.shape, generator=torch.Generator().manual_seed(5)))
    made.masters.refresh()
    made.model.outer.eval()
    long, other, row = sorted(range(CHATS), key=lambda i: int(made.rows.lengths[i]))[-3:]
    hidden = []
    for neighbour in (long, other):
        batch = made.objective.batch(made.rows, [np.array([neighbour, row])], torch.device("cpu"))
        with torch.no_grad():
            hidden.append(made.model.hidden(batch)[-int(made.rows.targets[row]) :])
    assert torch.equal(*hidden)


@pytest.mark.parametrize(
    "variant", ["adapter-pfeiffer", "adapter-houlsby", "lora", "lora-pissa", "lora-olora", "lora-dora", "ia3"]
)
def test_it_begins_as_the_model_itself(tmp_path: Path, llama: Path, variant: str) -> None:
    made = loaded(make(tmp_path, llama, "text-generation", VARIANTS[variant]), tmp_path)
    plain = loaded(make(tmp_path / "plain", llama, "text-generation", {"full": {}}), tmp_path / "plain")
    batch = made.objective.batch(made.rows, [np.array([3])], torch.device("cpu"))
    with torch.no_grad():
        made.model.outer.eval()
        ours, expected = made.model.hidden(batch), plain.model.hidden(batch)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0 if "adapter" in variant else 2e-5)
    assert made.method.servable_by(made.model) == (["vllm"] if variant in ("lora", "lora-olora") else [])


def test_a_prefix_of_a_text_begins_where_prompting_with_it_would_be(tmp_path: Path, llama: Path) -> None:
    text = "a red stone"
    tokenizer = tiny.tokenizer()
    length = len(tokenizer(text)["input_ids"])
    made = loaded(
        make(tmp_path, llama, "text-generation", {"prefix": {"length": length, "initialText": text}}), tmp_path
    )
    batch = made.objective.batch(made.rows, [np.array([3])], torch.device("cpu"))
    tokens = torch.cat([torch.tensor([tokenizer(text)["input_ids"]]), batch.tokens], dim=1)
    with torch.no_grad():
        ours = made.model.hidden(batch)
        plain = transformers.AutoModelForCausalLM.from_pretrained(llama)
        states = plain(tokens, output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(ours, states[batch.predict_at + length], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "prefix", "prompt", "pTuning"])
def test_noise_is_on_the_text_and_on_no_virtual_token(tmp_path: Path, llama: Path, variant: str) -> None:
    job = make(tmp_path, llama, "text-generation", VARIANTS[variant], training={"neftuneNoise": "5"})
    made = loaded(job, tmp_path)
    batch = made.objective.batch(made.rows, [np.array([3, 4])], torch.device("cpu"))
    embedded: list[torch.Tensor] = []
    made.model.inner.model.layers[0].register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0][0]))
    with torch.no_grad():
        for training in (False, True):
            made.model.outer.train(training)
            made.model.hidden(batch)
    plain, noisy = embedded
    virtual = 6 if variant in ("prompt", "pTuning") else 0
    moved = (noisy - plain).split([virtual + length for length in batch.documents.lengths])
    for part, length in zip(moved, batch.documents.lengths, strict=True):
        assert not part[:virtual].any()
        bound = 5 / math.sqrt(length * 64)
        assert 0.9 * bound < part[virtual:].abs().max() < 1.001 * bound


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("variant", ["prefix", "prefix-projection", "prompt", "pTuning"])
def test_answers_behind_virtual_tokens_are_those_of_peft(tmp_path: Path, variant: str) -> None:
    """Virtual tokens far from where they begin; peft generates with them, read back from what is saved."""
    folder = tiny.make_model(
        tmp_path / "model", tie_word_embeddings=False
    )  # a tied one says its last token again for ever
    made = loaded(make(tmp_path, folder, "text-generation", VARIANTS[variant]), tmp_path)
    cpu, prompts = torch.device("cpu"), [" ".join(tiny.WORDS[i : i + 2]) for i in range(6)]
    untouched = samples.answer(made.model, made.tokenizer, prompts, 5, cpu)
    made.masters.weights.add_(torch.randn(made.masters.weights.shape, generator=torch.Generator().manual_seed(5)))
    made.masters.refresh()
    ours = samples.answer(made.model, made.tokenizer, prompts, 5, cpu)
    made.method.save(tmp_path, made.model, made.masters.trained())
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), str(tmp_path))
    theirs = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        asked = made.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        length = asked["input_ids"].shape[1]
        tokens = model.generate(**asked, max_new_tokens=5, do_sample=False, eos_token_id=made.tokenizer.eos_token_id)[0]
        new = tokens[length:] if torch.equal(tokens[:length], asked["input_ids"][0]) else tokens
        theirs.append(made.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert ours == theirs != untouched


@pytest.mark.parametrize(("placement", "per_block"), [("houlsby", 2), ("pfeiffer", 1)])
def test_bottlenecks_have_the_papers_number_of_weights(
    tmp_path: Path, llama: Path, placement: str, per_block: int
) -> None:
    """2 d m + d + m each (Houlsby et al. 2019, section 2.1); the tiny model has 2 blocks of width 64."""
    method = {"adapter": {"placement": placement, "reductionFactor": 8}}
    assert len(loaded(make(tmp_path, llama, "text-generation", method), tmp_path).masters) == 2 * per_block * (
        2 * 64 * 8 + 64 + 8
    )


FROZEN: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "last block": ({"trainLastBlocks": 1}, "llama", ("layers.1.",)),
    "modules": ({"trainModules": ["mlp.*_proj"]}, "llama", ("mlp.",)),
    "embedding": ({"trainModules": ["embed_tokens"]}, "llama", ("embed_tokens",)),
    "head": ({"trainHead": True}, "untied", ("lm_head",)),
    "biases": ({"trainBiases": True}, "qwen2", ("bias",)),
    "head of a classifier": ({"trainHead": True}, "bert", ("classifier.", "pooler.")),
    "biases of a classifier": ({"trainBiases": True}, "bert", ("bias", "classifier.", "pooler.")),
}
"""What is trained, of which model, and parts of the names of the weights that it means."""


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        *((case, "fp32") for case in FROZEN),
        ("modules", "bf16"),
        ("embedding", "bf16"),
        ("biases of a classifier", "bf16"),
    ],
)
def test_what_is_frozen_keeps_every_bit(tmp_path: Path, case: str, precision: str) -> None:
    """Also where it computes in a coarser type than it is stored in."""
    freeze, family, parts = FROZEN[case]
    shape = {"tie_word_embeddings": False} if family == "untied" else {}
    folder = tiny.make_model(tmp_path / "model", "llama" if family == "untied" else family, **shape)
    task = "text-classification" if family == "bert" else "text-generation"
    training = {"precision": precision, "maxSteps": 2}
    finish(make(tmp_path, folder, task, {"freeze": freeze}, training=training, dataset=NOT_HELD_OUT), tmp_path)
    ours, base = (load_file(place / "model.safetensors") for place in (tmp_path / "output", folder))
    if family == "bert":  # stored without a head
        base = {f"bert.{name}": tensor for name, tensor in base.items()}
    assert ours.keys() - base.keys() == ({"classifier.weight", "classifier.bias"} if family == "bert" else set())
    moved = {name for name in base if not torch.equal(ours[name], base[name])}
    assert moved == {name for name in base if any(part in name for part in parts)} != set()


def test_gradual_unfreezing_moves_nothing_before_its_turn(tmp_path: Path, llama: Path) -> None:
    """Norm and last block, then the first, then the embedding; every bit of the others stays, each begins with its own warm-up, and a run resumes in any."""
    job = make(
        tmp_path, llama, "text-generation", {"gradualUnfreezing": {"everySteps": 3, "layerDecay": "0.5"}},
        checkpoints={"everySteps": 1, "keep": 20}, training={"warmupSteps": 1, "schedule": "constant"},
    )  # fmt: skip
    resumed(job, tmp_path, 7, 4, 2)
    start = load_file(llama / "model.safetensors")
    for step in range(1, 9):
        (file,) = tmp_path.glob(f"output.checkpoints/*/*/step-{step:08d}/*.safetensors")
        saved = load_file(file)
        moved = {name for name in start if not torch.equal(saved[f"weight/{name}"], start[name])}
        expected = {name for name in start if "layers.0." not in name and "embed" not in name}
        expected |= {name for name in start if step > 3 and "layers.0." in name}
        expected |= {name for name in start if step > 6 and "embed" in name}
        assert moved == expected, step
        if step == 4:  # Adam's first update is the learning rate in each weight that has a gradient
            size = (
                (saved["weight/model.layers.0.mlp.up_proj.weight"] - start["model.layers.0.mlp.up_proj.weight"])
                .abs()
                .median()
            )
            assert math.isclose(float(size), 0.5 * 5e-3, rel_tol=0.02)


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_gradual_unfreezing_begins_with_the_head_wherever_a_family_makes_it(tmp_path: Path, family: str) -> None:
    """XLM-RoBERTa makes it before its embeddings."""
    folder = tiny.make_model(tmp_path / "model", family)
    inner = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    above, *_, below = _from_the_head(inner, True, 1, [name for name, _ in inner.named_parameters()])
    head = tuple(f"{name}." for name in anatomy.head(inner.config, "text-classification"))
    assert {name for name in above if name.startswith(head)} and not any(name.startswith(head) for name in below)


@pytest.mark.parametrize("most", [masters.WHOLE_GRADIENT, 0], ids=["whole", "divided"])
@pytest.mark.parametrize("task", TASKS)
def test_gradual_unfreezing_has_the_same_gradients_on_two_ranks(
    tmp_path: Path, llama: Path, task: str, most: int
) -> None:
    """In each step of each stage: as on one rank up to rounding, whether each holds it whole or its part; and the same weights on both, bit for bit."""
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def kept(masters: Masters, *args: Any) -> None:
        rank = os.environ.get("RANK", "alone")  # of a fork; the run on one rank is in this process
        steps = found.setdefault(rank, [])
        gradient = torch.cat([part.clone() for part in masters.own_gradient()])
        step(masters, *args)
        computed = torch.cat([masters._parameters[name].detach().flatten() for name in masters.names])
        steps.append((gradient, computed))
        torch.save(steps, tmp_path / f"{rank}.pt")

    step = Masters.step
    with mock.patch.object(Masters, "step", kept), mock.patch.object(masters, "WHOLE_GRADIENT", most):
        for world in (1, 2):
            method = {"gradualUnfreezing": {"everyEpochs": "0.5"}}
            job = make(tmp_path / str(world), llama, task, method, training={"maxSteps": 8}, dataset=NOT_HELD_OUT)
            assert run_ranks(job, tmp_path / str(world), world).code == 0
    alone, *both = (torch.load(tmp_path / f"{rank}.pt") for rank in ("alone", "0", "1"))
    flowing = [int((gradient != 0).sum()) for gradient, _ in alone]
    assert len(flowing) == 8 and len({count // 1000 for count in flowing}) >= 3, "stages differ in what has a gradient"
    for (whole, _), (first, one), (second, other) in zip(alone, *both, strict=True):
        assert torch.equal(one, other)
        together = torch.cat([first, second])  # a model as small as this is one chunk
        torch.testing.assert_close(together[: len(whole)], whole, rtol=1e-3, atol=2e-5)


def test_moments_in_8_bits_learn_as_those_in_32_and_resume_exactly(tmp_path: Path, llama: Path) -> None:
    """Two bytes a weight in place of eight, in the checkpoint too, with groups of their own beginnings."""

    def job(folder: Path, bits: int) -> Any:
        training = {"optimizer": {"adamw": {"bits": bits, "beta2": "0.99"}}, "weightDecay": "0.1"}
        return make(folder, llama, "text-generation", VARIANTS["gradualUnfreezing"], training=training)

    usual = tmp_path / "32"
    finish(job(usual, 32), usual)
    small = same_bytes_when_stopped(lambda folder: job(folder, 8), tmp_path, 3)
    both = [[float.fromhex(loss) for loss in tiny.losses(folder / "output")] for folder in (small, usual)]
    np.testing.assert_allclose(*both, rtol=0, atol=0.05)
    assert both[0] != both[1]
    sizes = [
        sum(file.stat().st_size for file in folder.glob("output.checkpoints/*/*/step-00000008/*.safetensors"))
        for folder in (small, usual)
    ]
    assert 0 < sizes[0] < 0.6 * sizes[1]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "too many blocks": ({"freeze": {"trainLastBlocks": 3}}, "trainLastBlocks 3 is more than the 2 blocks"),
    "no such module": ({"freeze": {"trainModules": ["banana"]}}, "trainModules: 'banana' is the name of no module"),
    "tied head": ({"freeze": {"trainHead": True}}, "trainHead: the head of"),
    "no biases": ({"freeze": {"trainBiases": True}}, "has no biases"),
    "too slow": ({"gradualUnfreezing": {"everySteps": 4}}, "the last of 3 stages would begin at step 8"),
    "no step": ({"gradualUnfreezing": {"everyEpochs": "0"}}, "everyEpochs is not a single step"),
    "narrow": ({"adapter": {"reductionFactor": 65}}, "reductionFactor 65 leaves nothing"),
    "pattern": ({"lora": {"rankPattern": {"banana": 2}}}, "rankPattern: 'banana' is the name of no layer"),
    "broken pattern": ({"lora": {"alphaPattern": {"(": 2}}}, "alphaPattern: '(' is no regular expression"),
    "two patterns": (
        {"lora": {"alphaPattern": {"layers.0.self_attn.q_proj": 256, "[qk]_proj": 4}}},
        "model.layers.0.self_attn.q_proj fits 'layers.0.self_attn.q_proj' and '[qk]_proj'; only one may",
    ),
    "rank of pissa": (
        {"lora": {"rank": 48, "initialization": "pissa"}},
        "rank: 48 exceeds the 32 components of model.layers.0",
    ),
    "rank of olora": (
        {"lora": {"rankPattern": {"v_proj": 40}, "initialization": "olora"}},
        "40 exceeds the 32 components of model.layers.0.self_attn.v_proj",
    ),
    "target path": ({"lora": {"targets": ["q_proj", "self_attention.v_proj"]}}, "targets: self_attention.v_proj is no"),
    "targets beside all": ({"lora": {"targets": ["all-linear", "banana"]}}, "targets: all-linear is every layer"),
    "saved path": (
        {"lora": {"modulesToSave": ["layers.99.input_layernorm"]}},
        "modulesToSave: layers.99.input_layernorm is no",
    ),
    "saved tied embedding": ({"lora": {"modulesToSave": ["model.embed_tokens"]}}, "is its embedding"),
    "saved parent of a target": ({"lora": {"modulesToSave": ["mlp"]}}, "mlp also gets an adapter"),
    "saved and quantised": (
        {"qlora": {"targets": ["q_proj"], "modulesToSave": ["down_proj"]}},
        "down_proj is quantised",
    ),
    "tied head by name": ({"freeze": {"trainModules": ["lm_head"]}}, "name that ('lm_head' is the head)"),
    "no position left": ({"prompt": {"length": 1024}}, "method.prompt.length leaves no position"),
    "saved module": ({"lora": {"modulesToSave": ["banana"]}}, "modulesToSave: banana is no module"),
    "saved tied head": ({"lora": {"modulesToSave": ["lm_head"]}}, "is its embedding"),
    "saved target": ({"lora": {"modulesToSave": ["q_proj"]}}, "q_proj also gets an adapter"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(tmp_path: Path, llama: Path, case: str) -> None:
    method, sentence = MISTAKES[case]
    job = make(tmp_path, llama, "text-generation", method)
    verdict = run(job, tmp_path)
    assert verdict.code == ExitCode.USER_ERROR
    assert sentence in verdict.message


def test_a_model_that_is_quantised_already_is_refused(tmp_path: Path, llama: Path) -> None:
    folder = tmp_path / "quantised"
    options = transformers.BitsAndBytesConfig(load_in_4bit=True)
    transformers.AutoModelForCausalLM.from_pretrained(llama, quantization_config=options).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    job = make(tmp_path, folder, "text-generation", {"qlora": {}})
    verdict = run(job, tmp_path)
    assert (verdict.code, "is quantised already" in verdict.message) == (ExitCode.USER_ERROR, True)


def test_a_classifier_of_other_classes_is_refused(tmp_path: Path) -> None:
    first = make(tmp_path / "first", tiny.make_encoder(tmp_path / "model"), "text-classification", {"full": {}})
    finish(first, tmp_path / "first")
    data = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": str(i), "label": i % 3} for i in range(9)])
    job = tiny.job(tmp_path / "second", tmp_path / "first/output", data, task="text-classification")
    verdict = run(job, tmp_path / "second")
    assert (verdict.code, "tells 2 classes apart and the rows have 3" in verdict.message) == (ExitCode.USER_ERROR, True)


def test_an_adapter_of_another_task_is_refused(tmp_path: Path, llama: Path) -> None:
    for task, other in (TASKS, reversed(TASKS)):
        first = make(tmp_path / task, llama, task, {"lora": {}}, training={"maxSteps": 1})
        finish(first, tmp_path / task)
        model = {"adapter": {"uri": f"file://{tmp_path}/{task}/output"}}
        job = make(tmp_path / f"{task}-continued", llama, other, {"lora": {}}, model=model)
        verdict = run(job, tmp_path / f"{task}-continued")
        assert verdict.code == ExitCode.USER_ERROR
        assert f"was not made for task {other}" in verdict.message


def test_a_prefix_longer_than_a_window_is_refused(tmp_path: Path) -> None:
    folder = tiny.make_model(
        tmp_path / "model", "gemma3_text", sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    job = make(tmp_path, folder, "text-generation", {"prefix": {"length": 12, "initialText": "a long red stone"}})
    verdict = run(job, tmp_path)
    assert verdict.code == ExitCode.USER_ERROR
    assert "method.prefix.length: 12 does not fit into the sliding window" in verdict.message


@pytest.mark.parametrize("family", tiny.ENCODERS)
@pytest.mark.parametrize("variant", ["lora", "ia3"])
def test_merged_encoders_compute_what_was_trained(tmp_path: Path, family: str, variant: str) -> None:
    output = {"uri": f"file://{tmp_path}/output", "merged": True}
    model = tiny.make_encoder(tmp_path / "model", family)
    job = make(tmp_path, model, "text-classification", VARIANTS[variant], output=output, **FEW)
    made = trained(job, tmp_path)
    assert_same_logits(made, opened_as_its_card_says(tmp_path / "output"), tmp_path)


BY_HAND: dict[str, tuple[dict[str, Any], int]] = {
    "pissa": ({"initialization": "pissa", "rankPattern": {"q_proj": 3}, "alphaPattern": {"up_proj": 20}}, 2),
    "olora": ({"initialization": "olora"}, 2),
    "pissa, rslora": ({"initialization": "pissa", "useRslora": True}, 2),
    "rslora": ({"useRslora": True}, 1),
    "patterns": ({"rankPattern": {"layers.0.*q_proj": 6}, "alphaPattern": {"up_proj": 20, "v_proj": 3}}, 1),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_an_adapter_is_a_plain_lora_on_the_untouched_base(tmp_path: Path, llama: Path, case: str) -> None:
    """W + sBA by hand, s = alpha / r (rsLoRA: alpha / sqrt(r)), gives the logits of what was trained; PiSSA and OLoRA take twice the rank and alpha."""
    settings, times = BY_HAND[case]
    method = {"lora": {"rank": 4, "alpha": 8, **settings}}
    made = trained(make(tmp_path, llama, "text-generation", method, **FEW), tmp_path)
    adapter = load_file(tmp_path / "output/adapter_model.safetensors")
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    weights = dict(base.named_parameters())
    ranks, alphas = (settings.get(f"{kind}Pattern", {}) for kind in ("rank", "alpha"))

    def given(patterns: dict[str, int], name: str, usual: int) -> int:
        return next((value for pattern, value in patterns.items() if re.search(f"{pattern}$", name)), usual)

    for key in [key for key in adapter if "lora_A" in key]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        down, up = adapter[key], adapter[key.replace("lora_A", "lora_B")]
        rank, alpha = times * given(ranks, name, 4), times * given(alphas, name, 8)
        assert len(down) == rank
        weights[f"{name}.weight"].data += alpha / (rank**0.5 if "useRslora" in settings else rank) * up @ down
    assert_same_logits(made, base.eval(), tmp_path, atol=1e-5)


def test_an_adapter_of_twice_the_rank_is_continued(tmp_path: Path, llama: Path) -> None:
    """What PiSSA published is a LoRA like any other."""
    first = make(tmp_path / "first", llama, "text-generation", VARIANTS["lora-pissa"])
    finish(first, tmp_path / "first")
    job = make(
        tmp_path / "second", llama, "text-generation", {"lora": {}}, model={"adapter": {"uri": f"file://{tmp_path}/first/output"}},
        training={"learningRate": "0"},
    )  # fmt: skip
    verdict = run(job, tmp_path / "second")
    assert verdict.code == 0, verdict.message
    assert json.loads((tmp_path / "second/output/adapter_config.json").read_text())["r"] == 32
    ended, begun = (tiny.losses(tmp_path / name / "output", "eval_loss_hex") for name in ("first", "second"))
    assert math.isclose(float.fromhex(ended[-1]), float.fromhex(begun[0]), abs_tol=1e-5)
