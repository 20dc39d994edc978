"""What is found before a GPU is asked for: the same as training would find, without a weight."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune_crds import resolution
from finetune_crds.resolution import Defaults, resolve
from finetune_crds.resolved import ResolvedFineTune
from finetune_crds.v1alpha1 import FineTuneJob, Inputs, MemoryEstimate, PreflightReport
from finetune_crds.verdict import ExitCode, Verdict
from finetune_trainer import preflight, setup, train
from finetune_trainer.data.encoding import EncodedRow
from finetune_trainer.data.holdout import divide
from finetune_trainer.data.prepared import Index, RowSet, RowWriter
from finetune_trainer.modelling import attention, footprint, masters
from finetune_trainer.ranks import Ranks

from . import pictures, tiny
from .runs import loaded

TRAINING: dict[str, Any] = {"epochs": "2", "batchSize": 4, "learningRate": "1e-3", "sequenceLength": 256}
PRECISE = {"training": {**TRAINING, "precision": "fp32"}}


def checked(job: Any, folder: Path) -> Verdict:
    return preflight.run(job, tiny.context(job, folder / "scratch"))


def report(verdict: Verdict) -> PreflightReport:
    assert verdict.code == ExitCode.FINISHED, verdict.message
    assert verdict.preflight is not None
    return verdict.preflight


def job(folder: Path, model: Path, rows: list[dict[str, Any]], /, **spec: Any) -> Any:
    data = tiny.write_rows(folder / "train.jsonl", rows)
    return tiny.job(folder, model, data, **{"training": TRAINING, **spec})


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {}},
    "dora": {"lora": {"useDora": True}},
    "pissa": {"lora": {"initialization": "pissa"}},
    "full": {"full": {}},
    "freeze": {"freeze": {"trainLastBlocks": 1}},
    "gradual": {"gradualUnfreezing": {"everySteps": 1}},
    "adapter": {"adapter": {}},
    "prefix": {"prefix": {}},
    "prompt": {"prompt": {"length": 4}},
    "pTuning": {"pTuning": {}},
    "ia3": {"ia3": {}},
}


@pytest.mark.parametrize("name", METHODS)
def test_it_counts_the_steps_rows_and_weights_that_training_has(tmp_path: Path, llama: Path, name: str) -> None:
    given = job(tmp_path, llama, tiny.chat_rows(40), method=METHODS[name])
    verdict = checked(given, tmp_path)
    found = report(verdict)
    context = tiny.context(given, tmp_path / "scratch")
    reading = setup.read(given.spec, context)
    loaded = setup.load(reading, context.ranks)
    assert verdict.inputs == reading.inputs
    assert (found.rows, found.tokens, found.steps) == (reading.inputs.rows, reading.inputs.tokens, loaded.total_steps)
    assert found.trained_parameters == len(loaded.masters)
    assert found.parameters == sum(each.numel() for each in loaded.model.outer.parameters())
    assert (found.learning_rate, found.memory) == ("1e-3", None), "there is no GPU"
    assert not list(tmp_path.rglob("output*/*")) and not list(tmp_path.rglob(".tmp*")), "it leaves nothing"


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_default_learning_rate_is_that_for_the_models_size(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Of quantised weights those that they stand for are counted."""
    weights = sum(each.numel() for each in AutoModelForCausalLM.from_pretrained(llama).parameters())
    training = {name: value for name, value in TRAINING.items() if name != "learningRate"}
    given = job(tmp_path, llama, tiny.chat_rows(9), method={method: {}}, training=training)
    for largest, rate in ((weights, "2e-4"), (weights - 1, "1e-4")):
        monkeypatch.setattr(resolution, "LARGE", largest)
        assert loaded(given, tmp_path).spec.training.learning_rate == rate
        assert report(checked(given, tmp_path)).learning_rate == rate


def test_training_ends_after_the_steps_that_were_told(tmp_path: Path, llama: Path) -> None:
    given = job(tmp_path, llama, tiny.chat_rows(9))
    steps = report(checked(given, tmp_path)).steps
    verdict = train.run(given, tiny.context(given, tmp_path / "scratch"))
    assert (verdict.code, verdict.step, verdict.total_steps) == (0, steps, steps), verdict.message
    again = report(checked(given, tmp_path))
    assert again.output_exists, "nothing would be trained"


def _rows(*wrong: dict[str, Any]) -> list[dict[str, Any]]:
    return [*tiny.chat_rows(3), *wrong]


SAID = [{"role": "user", "content": "red"}]


@pytest.mark.parametrize(
    ("rows", "spec", "code", "says"),
    [
        pytest.param(_rows({"messages": "red"}), {}, ExitCode.DATA_ERROR, "train.jsonl row 4", id="a row is no chat"),
        pytest.param(_rows({"other": 1}), {}, ExitCode.DATA_ERROR, "train.jsonl row 4", id="a column is missing"),
        pytest.param([{"messages": SAID}] * 4, {}, ExitCode.DATA_ERROR, "row", id="nothing to learn: all labels masked"),
        pytest.param(
            _rows(), {"method": {"lora": {"targets": ["w_q"]}}}, ExitCode.USER_ERROR, "method.lora.targets: w_q", id="targets"
        ),
        pytest.param(
            _rows(), {"training": {**TRAINING, "sequenceLength": 4096}}, ExitCode.USER_ERROR, "sequenceLength 4096", id="too long"
        ),
        pytest.param(_rows(), {"task": "summarization"}, ExitCode.USER_ERROR, "not for summarization", id="task"),
        pytest.param(
            _rows(),
            {"method": {"gradualUnfreezing": {"everySteps": 50}}},
            ExitCode.USER_ERROR,
            "the last of",
            id="stages that do not fit",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_ends_it_as_it_would_end_training(
    tmp_path: Path, llama: Path, rows: list[dict[str, Any]], spec: dict[str, Any], code: ExitCode, says: str
) -> None:
    given = job(tmp_path, llama, rows, **spec)
    verdict = checked(given, tmp_path)
    assert (verdict.code, verdict.preflight) == (code, None)
    assert says in verdict.message
    trained = train.run(given, tiny.context(given, tmp_path / "other"))
    assert (trained.code, trained.message) == (verdict.code, verdict.message)


def test_places_are_looked_at(tmp_path: Path, llama: Path) -> None:
    gone = tiny.job(tmp_path, llama, tmp_path / "nowhere.jsonl", training=TRAINING)
    verdict = checked(gone, tmp_path)
    assert verdict.code == ExitCode.USER_ERROR and "nowhere.jsonl" in verdict.message

    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "thesis.txt").write_text("years of work")
    verdict = checked(job(tmp_path, llama, tiny.chat_rows(9)), tmp_path)
    assert verdict.code == ExitCode.USER_ERROR and "thesis.txt" in verdict.message

    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    storage = {"checkpoints": {"storage": {"uri": f"file://{blocked}/checkpoints"}}}
    shutil.rmtree(tmp_path / "output")
    verdict = checked(job(tmp_path, llama, tiny.chat_rows(9), **storage), tmp_path)
    assert verdict.code == ExitCode.STORAGE_ERROR and "file/checkpoints" in verdict.message


def test_an_unknown_family_and_incomplete_weights_are_refused_unread(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    verdict = checked(job(tmp_path, model, tiny.chat_rows(9)), tmp_path)
    assert verdict.code == ExitCode.USER_ERROR and "lacks 9 weights, the first model.layers.2" in verdict.message

    (model / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    verdict = checked(job(tmp_path, model, tiny.chat_rows(9)), tmp_path)
    assert verdict.code == ExitCode.USER_ERROR and "gpt_neox" in verdict.message


VOWELS = [{"name": "vowel", "regex": {"pattern": "[aeiou]"}}]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"objective": {"dpo": {}}},
    "dpo, full": {"objective": {"dpo": {}}, "method": {"full": {}}},
    "orpo": {"objective": {"orpo": {}}},
    "reward": {"objective": {"reward": {}}},
    "kto": {"objective": {"kto": {}}},
    "pretrain": {"objective": {"pretrain": {}}},
    "grpo": {"objective": {"grpo": {"rewards": VOWELS, "maxCompletionLength": 40}}},
    "grpo, two steps on each answer": {"objective": {"grpo": {"rewards": VOWELS, "maxCompletionLength": 40, "iterations": 2}}},
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_memory_of_objectives(tmp_path: Path, llama: Path, name: str) -> None:
    kinds = {
        "kto": {"prompt": "red ", "completion": "stone"},
        "pretrain": {"text": "red stone"},
        "grpo": {"prompt": "red "},
    }
    row = kinds.get(name.partition(",")[0], {"prompt": "red ", "chosen": "stone", "rejected": "lamp"})
    rows = [row | ({"label": bool(i % 2)} if name == "kto" else {}) for i in range(12)]
    given = job(tmp_path, llama, rows, resources={"gpusPerNode": 1}, **OBJECTIVES[name])
    assert report(checked(given, tmp_path)).memory is not None


@pytest.mark.parametrize("given", [{}, {"microBatchSize": 1}], ids=["usual", "told"])
def test_memory_at_full_speed_is_that_of_as_many_rows_as_are_tried(
    tmp_path: Path, llama: Path, given: dict[str, Any]
) -> None:
    """Which is all 12 of a step here; and nothing is tried where the job says how many."""

    def memory(name: str, **training: Any) -> MemoryEstimate:
        made = job(
            tmp_path / name, llama, tiny.chat_rows(48), method={"lora": {}}, resources={"gpusPerNode": 1},
            training={**TRAINING, "batchSize": 12, **training},
        )  # fmt: skip
        found = report(checked(made, tmp_path / name)).memory
        assert found is not None
        return found

    asked = memory("asked", **given)
    if given:
        assert asked.full_speed is None
    else:
        assert asked.full_speed == memory("all", microBatchSize=12).total
        assert asked.total == memory("one", microBatchSize=1).total


def test_memory_of_grpo_grows_with_answers(tmp_path: Path, llama: Path) -> None:
    """With each answer's length in training, with the number of those that are written together before it."""

    def needed(name: str, **grpo: Any) -> int:
        settings = {"rewards": VOWELS, "generations": 4, "maxCompletionLength": 16} | grpo
        rows = [{"prompt": "red "}] * 12
        training = {**TRAINING, "microBatchSize": 1}
        given = job(
            tmp_path / name, llama, rows, resources={"gpusPerNode": 1}, objective={"grpo": settings}, training=training
        )
        memory = report(checked(given, tmp_path / name)).memory
        assert memory is not None
        return int(memory.activations.removesuffix("Mi"))

    assert needed("short") < needed("long", maxCompletionLength=160)
    assert needed("few", generationBatchSize=4) < needed("many", generations=16, generationBatchSize=64)


TASKS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "text-classification": ("bert", {}, [{"text": word, "label": word[:1]} for word in tiny.WORDS]),
    "token-classification": ("roberta", {}, tiny.tagged_rows(20)),
    "question-answering": ("distilbert", {}, tiny.question_rows(20)),
    "summarization": ("t5", {}, tiny.pair_rows(20)),
    "translation": ("bart", {}, tiny.pair_rows(20)),
}


@pytest.mark.parametrize(
    "family",
    ["vit", "swinv2", "timm_wrapper", "timm_wrapper resnet18", "siglip2", "imagegpt", "perceiver ConvProcessing"],
)
def test_memory_of_images(tmp_path: Path, family: str) -> None:
    """In bf16, also where a family has tables of its own in fp32."""
    model = pictures.make_model(tmp_path / "model", family)
    source = [{"uri": f"file://{pictures.write_folder(tmp_path / 'images')}"}]
    method = {"lora" if family == "siglip2" else "full": {}}
    given = tiny.job(
        tmp_path, model, source, task="image-classification", method=method, resources={"gpusPerNode": 1},
        training={"epochs": "1", "batchSize": 4},
    )  # fmt: skip
    found = report(checked(given, tmp_path))
    assert (found.steps, found.tokens, found.longest_row) == (4, None, None)
    assert found.memory is not None and found.memory.micro_batch_tokens is None


def test_in_a_pod_the_supervisor_leaves_what_was_found(tmp_path: Path, llama: Path) -> None:
    """As the operator's preflight pods start it: no GPU, though the job asks for one."""
    given = job(tmp_path, llama, tiny.chat_rows(9), resources={"gpusPerNode": 1})
    file, message = tmp_path / "job.json", tmp_path / "message"
    file.write_text(given.model_dump_json(by_alias=True, exclude_none=True))
    environment = {
        "FINETUNE_ROOT": str(tmp_path / "root"), "FINETUNE_TERMINATION_FILE": str(message),
        "FINETUNE_JOB_FILE": str(file), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = ["-m", "finetune_trainer.supervisor", sys.executable, "-m", "finetune_trainer.worker", "preflight"]
    done = subprocess.run([sys.executable, *command], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    verdict = Verdict.model_validate_json(message.read_text())
    assert verdict.preflight is not None and verdict.preflight.rows == 9
    assert verdict.preflight.memory is not None
    assert verdict.output is None and not (tmp_path / "output").exists()


@pytest.mark.parametrize("task", TASKS)
def test_memory_of_tasks(tmp_path: Path, task: str) -> None:
    family, spec, rows = TASKS[task]
    model = tiny.make_model(tmp_path / "model", family)
    training = {**TRAINING, "sequenceLength": 128}
    given = job(
        tmp_path, model, rows, task=task, training=training, resources={"gpusPerNode": 1},
        evaluation={"maxNewTokens": 16} if task in ("summarization", "translation") else {}, **spec,
    )  # fmt: skip
    memory = report(checked(given, tmp_path)).memory
    assert memory is not None and memory.micro_batch_tokens


def test_the_footprint_of_a_step_counts_each_tensor_once(tmp_path: Path, llama: Path) -> None:
    """By hand, of full fine-tuning in fp32: 4 bytes a weight for the masters that the model computes with, 4 for gradients, 8 for moments."""
    given = job(tmp_path, llama, tiny.chat_rows(9), method={"full": {}}, **PRECISE)
    context = tiny.context(given, tmp_path / "scratch")
    loaded = setup.load(setup.read(given.spec, context), Ranks(device=footprint.META))
    found = footprint.of(loaded, 1)
    weights = loaded.masters.weights.numel()
    assert weights <= found.training / 16 < weights + 512
    assert 0 < found.weights < 4096, "buffers only: the weights are the masters"
    assert found.activations > 4 * 64 * (found.tokens or 0)
    assert found.total == found.weights + found.training + found.activations


@pytest.mark.parametrize(("most", "divided"), [(masters.WHOLE_GRADIENT, 12), (0, 16)], ids=["whole", "divided"])
def test_several_gpus_divide_what_training_takes(
    tmp_path: Path, llama: Path, most: int, divided: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16 bytes a weight the gradient's 4 are each GPU's own unless there are too many; 2 more are the weights to compute with."""
    monkeypatch.setattr(masters, "WHOLE_GRADIENT", most)
    given = job(tmp_path, llama, tiny.chat_rows(9), method={"full": {}}, training={**TRAINING, "precision": "bf16"})
    context = tiny.context(given, tmp_path / "scratch")
    reading = setup.read(given.spec, context)
    alone, both = (
        footprint.of(setup.load(reading, Ranks(device=footprint.META), world=world), world) for world in (1, 2)
    )
    weights = alone.training / 16
    assert both.training == pytest.approx((16 - divided / 2) * weights, rel=0.02)
    assert both.weights == pytest.approx(2 * weights, rel=0.05) and alone.weights == pytest.approx(
        both.weights, rel=0.01
    )


@pytest.mark.parametrize(
    ("method", "less"),
    [
        ({"full": {}}, 1 / 3),
        ({"lora": {}}, 1 / 3),
        ({"prefix": {"length": 4}}, 1 / 3),
        ({"freeze": {"trainLastBlocks": 1}}, 1),
    ],
    ids=["full", "lora", "prefix", "freeze"],
)
def test_gradient_checkpointing_keeps_less(tmp_path: Path, method: dict[str, Any], less: float) -> None:
    """Of eight blocks the inputs, and one block whole: less than a third of all that they compute. Of blocks below those that are trained nothing."""
    model = tiny.make_model(tmp_path / "model", num_hidden_layers=8)
    training = {**TRAINING, "precision": "bf16", "sequenceLength": 512}
    activations = []
    for saving in (False, True):
        given = job(
            tmp_path, model, tiny.chat_rows(9), method=method, training=training | {"gradientCheckpointing": saving}
        )
        context = tiny.context(given, tmp_path / "scratch")
        loaded = setup.load(setup.read(given.spec, context), Ranks(device=footprint.META))
        workspaces = 2 * 32 * 2**20
        activations.append(footprint.of(loaded, 1).activations - workspaces)
    assert 0 < activations[1] < activations[0] * less


# Against GPUs: docs/performance.md


SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "tie_word_embeddings": False},
}
LORA = {"lora": {"rank": 16}}


def hollow(folder: Path, shape: dict[str, Any]) -> Path:
    """A model of that shape in bf16 whose weights' file is a header and a hole."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128_256, max_position_embeddings=8192,
        bos_token_id=2, eos_token_id=1, pad_token_id=0, dtype="bfloat16", **shape,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, parameter in model.named_parameters():
        end = at + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return folder


def counted(folder: Path, shape: str, method: dict[str, Any], lengths: list[int], micro: int) -> float:
    """GiB of a step over packed rows of these lengths, as bench/gpu_methods.py measures it."""
    model = hollow(folder / "model", SHAPES[shape])
    writer = RowWriter(folder / "rows")
    for i, length in enumerate(lengths):
        row = EncodedRow([2] * length, [True] * length, targets=length - 1)
        writer.add(row, sources=0, files=0, numbers=i + 1, content=i, groups=i, slices=0)
    writer.finish(Index(digest="sha256:random", files=["random"], classes=[]))
    rows = RowSet.open(folder / "rows")
    manifest = {
        "spec": {
            "model": {"uri": f"file://{model}"},
            "dataset": {"train": [{"uri": "file:///rows.jsonl"}], "evaluation": {"fraction": "0"}},
            "method": method,
            "training": {
                "maxSteps": 1, "batchSize": 4, "microBatchSize": micro, "sequenceLength": 4096,
                "packing": True,
            },
            "output": {"uri": f"file://{folder}/output"},
        }
    }  # fmt: skip
    spec = resolve(FineTuneJob.model_validate(manifest), Defaults(trainer_image="x")).spec
    assert isinstance(spec, ResolvedFineTune)
    config = LlamaConfig.from_pretrained(model)
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    reading = setup.Reading(
        spec, model, None, config, tokenizer, None, rows, divide(spec, rows), Inputs(), {}, None, folder
    )
    return footprint.of(setup.load(reading, Ranks(device=footprint.META)), 1).total / 2**30


FIXED = [4096] * 4


@pytest.fixture
def shared_keys_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11 had it, which the GPU machine has: its kernel of attention took no keys that heads share."""

    def varlen_attn(
        query: Any, key: Any, value: Any, ends: Any, ends_of_keys: Any, longest: int, longest_of_keys: int,
        *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    ) -> Any:  # fmt: skip
        raise AssertionError("not on the meta device")

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_kernel", attention._variable_length_kernel())


@pytest.mark.usefixtures("shared_keys_repeated")
@pytest.mark.parametrize(
    ("method", "micro", "measured"),
    [
        pytest.param(LORA, 4, 29.65, id="lora"),
        pytest.param(LORA, 1, 9.98, id="lora, one sequence a forward pass"),
        pytest.param({"full": {}}, 4, 51.58, id="full"),
        pytest.param({"qlora": {}}, 4, 28.30, id="qlora, 4 bits"),
        pytest.param({"qlora": {"bits": 8}}, 4, 28.75, id="qlora, 8 bits"),
    ],
)
def test_memory_is_what_a_gpu_needed(tmp_path: Path, method: dict[str, Any], micro: int, measured: float) -> None:
    """GiB of a model of 1.2 billion weights; bench/gpu_tasks.py compares all that was measured."""
    estimate = counted(tmp_path, "1b", method, FIXED, micro)
    assert np.isclose(estimate, measured, rtol=0.03), f"{estimate:.2f} GiB against {measured}"


def test_memory_of_parts_as_a_gpu_has_them() -> None:
    """Bytes: seen in the allocator's history on a GPU."""

    def held(compute: Callable[[], Any]) -> tuple[int, int]:
        with footprint._on_a_gpu(), footprint._Living() as living:
            kept = compute()
            del kept
        return living.peak, living.now

    query = torch.empty(2, 4, 504, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    plain, _ = held(lambda: F.scaled_dot_product_attention(query, query, query))
    assert plain == query.nbytes + footprint._rounded(4 * 2 * 4 * 504), "the output and a number a token"
    for keys, copied in ((504, 0), (501, 2 * 4 * 504 * 504 * 2)):
        mask = torch.empty(2, 4, 504, keys, device="meta", dtype=torch.bfloat16)
        key = query[..., :keys, :]
        masked, _ = held(lambda: F.scaled_dot_product_attention(query, key, key, attn_mask=mask))  # noqa: B023
        assert masked == plain + copied, keys

    numbers = torch.empty(1000, 512, device="meta", requires_grad=True)
    assert held(lambda: F.dropout(numbers, 0.1))[0] == numbers.nbytes + numbers.numel()
    assert held(lambda: numbers.detach().logsumexp(-1))[0] >= numbers.nbytes


def test_the_largest_micro_batch_is_that_with_the_most_tokens_in_the_graph(tmp_path: Path, llama: Path) -> None:
    """Of KTO own answers only: those to other rows have no gradient. Of what is padded, with padding."""
    rows = [{"prompt": "red ", "completion": word, "label": i % 2 == 0} for i, word in enumerate(tiny.WORDS)]
    given = job(tmp_path, llama, rows, objective={"kto": {}})
    context = tiny.context(given, tmp_path / "scratch")
    loaded = setup.load(setup.read(given.spec, context), Ranks(device=footprint.META))
    ids = np.arange(3)
    batch: Any = loaded.objective.batch(loaded.rows, [ids], footprint.META)
    assert loaded.objective.extent(loaded.rows, ids) == batch.tokens.numel()
    assert batch.others.tokens.numel() + batch.tokens.numel() == loaded.rows.lengths[ids].sum()
