"""objective.grpo: what it samples, that it learns, that it resumes exactly, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune_crds.verdict import ExitCode, Verdict
from finetune_trainer import setup, train
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.modelling import generation
from finetune_trainer.objectives.grpo import answer_keys

from . import tiny
from .judges import SECRET
from .runs import published
from .spawn import run_ranks
from .variants import VARIANTS

VOWELS = {"name": "vowel", "regex": {"pattern": "[aeiou]"}}
RATES = {"ia3": "1e-1"}


def prompts(count: int) -> list[dict[str, Any]]:
    """Ragged questions, half of them with an answer that is dropped."""
    rows = []
    for row in tiny.chat_rows(count):
        messages = row["messages"]
        rows.append({"messages": messages if len(rows) % 2 else messages[:-1]})
    return rows


def make(
    folder: Path, model: Path, method: dict[str, Any], /, rows: list[dict[str, Any]] | None = None, **spec: Any
) -> Any:
    """A job of six steps whose answers have ten tokens at most, evaluated on what it trains on."""
    data = tiny.write_rows(folder / "train.jsonl", rows or prompts(16))
    (name,) = method
    training = {
        "maxSteps": 6,
        "batchSize": 4,
        "learningRate": RATES.get(name, "1e-2"),
        "schedule": "constant",
        "warmupSteps": 0,
    }
    grpo = {"rewards": [VOWELS], "generations": 4, "maxCompletionLength": 10} | spec.pop("grpo", {})
    dataset = {"evaluation": {"sources": [{"uri": f"file://{data}"}]}} | spec.pop("dataset", {})
    training |= spec.pop("training", {})
    return tiny.job(folder, model, data, objective={"grpo": grpo}, method=method, training=training, dataset=dataset, **spec)  # fmt: skip


def trained(folder: Path, model: Path, method: dict[str, Any], /, **spec: Any) -> list[dict[str, Any]]:
    """Lines of the journal."""
    job = make(folder, model, method, **spec)
    verdict = train.run(job, tiny.context(job, folder / "scratch"))
    assert verdict.code == 0, verdict.message
    return lines(folder)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "output/metrics.jsonl").read_text().splitlines()]


def loaded(job: Any, folder: Path) -> Any:
    context = tiny.context(job, folder / "scratch")
    return setup.load(setup.read(job.spec, context), context.ranks)


@pytest.mark.parametrize("variant", ["lora", "full", "gradualUnfreezing"])
def test_it_learns_and_resumes_exactly(tmp_path: Path, llama: Path, variant: str) -> None:
    """With two steps on each set of answers; asked to stop behind the first step it does the second, behind which new answers come."""
    method = VARIANTS[variant]
    grpo = {"iterations": 2}
    training = {"maxSteps": 4}
    place = tmp_path / "job"
    whole = trained(place, llama, method, grpo=grpo, training=training)
    place.rename(tmp_path / "whole")
    steps = [line for line in whole if "loss" in line]
    assert len(steps) == 4 and steps[0]["reward"] == steps[1]["reward"]

    job = make(place, llama, method, grpo=grpo, training=training)
    scratch = place / "scratch"
    stopped = train.run(job, tiny.context(job, scratch, reporter=tiny.Recorder(stop_at=1)))
    assert stopped.code == ExitCode.STOPPED and stopped.step == 2, stopped.message
    verdict = train.run(job, tiny.context(job, scratch, run_id="second"))
    assert verdict.code == 0, verdict.message
    assert published(place) == published(tmp_path / "whole")


class Impatient(tiny.Recorder):
    """Asks to stop once the run has looked so often whether it should."""

    looks = 0

    def __init__(self, patience: int) -> None:
        self.patience = patience
        super().__init__()

    @property
    def stop_requested(self) -> str | None:
        self.looks += 1
        return "Suspended" if self.looks > self.patience else None

    @stop_requested.setter
    def stop_requested(self, _: str | None) -> None: ...


@pytest.mark.parametrize(("patience", "step"), [(8, 0), (18, 0), (30, 2)])
def test_a_stop_is_heard_between_two_tokens(tmp_path: Path, llama: Path, patience: int, step: int) -> None:
    """While held-out prompts are answered, the first set of answers is written, or the second; what was written of it is written again."""
    spec: dict[str, Any] = {"grpo": {"iterations": 2}, "training": {"maxSteps": 4}}
    place, whole = tmp_path / "job", tmp_path / "whole"
    trained(place, llama, {"lora": {}}, **spec)
    place.rename(whole)
    job = make(place, llama, {"lora": {}}, **spec)
    scratch, reporter = place / "scratch", Impatient(patience)
    stopped = train.run(job, tiny.context(job, scratch, reporter=reporter))
    assert (stopped.code, stopped.step) == (ExitCode.STOPPED, step), stopped.message
    assert "Suspended" in (stopped.message or "") and reporter.looks <= patience + 4
    verdict = train.run(job, tiny.context(job, scratch, run_id="second"))
    assert verdict.code == 0, verdict.message
    assert published(place) == published(whole)


def test_a_stop_that_one_rank_hears_while_it_writes_stops_all(tmp_path: Path, llama: Path) -> None:
    job = make(tmp_path, llama, {"lora": {}}, dataset={"evaluation": {"fraction": "0"}})
    run_ranks(job, tmp_path, 2, reporter=Impatient(9))
    for rank in (0, 1):
        verdict = Verdict.model_validate_json((tmp_path / f"verdict-{rank}.json").read_bytes())
        assert (verdict.code, verdict.step) == (ExitCode.STOPPED, 0), verdict.message


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_reward_rises(tmp_path: Path, method: str) -> None:
    """Of a model whose logits differ enough for its blocks alone to change what it says."""
    model = tiny.make_model(tmp_path / "model", initializer_range=0.1)
    training = {"maxSteps": 12, "learningRate": "1e-2" if method == "lora" else "3e-3"}
    found = trained(tmp_path, model, {method: {}}, grpo={"generations": 8}, training=training)
    rewards = [line["reward"] for line in found if "loss" in line]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.3, rewards
    before, after = (line["eval_reward"] for line in found if "eval_reward" in line)
    assert after > before + 0.3


def test_what_is_sampled_does_not_depend_on_what_is_sampled_with_it(tmp_path: Path, llama: Path) -> None:
    """Nor on padding; alone each prompt is the same tokens as by transformers' own forward pass without a cache."""
    made = loaded(make(tmp_path, llama, {"lora": {}}), tmp_path)
    prompts = [np.array(made.rows.tokens[made.rows.offsets[i] : made.rows.offsets[i + 1]], np.int64) for i in range(6)]
    assert len(set(map(len, prompts))) > 2
    keys = answer_keys(42, 3, np.arange(6), 5)
    device = torch.device("cpu")
    together = generation.write(made.model, prompts, keys, 12, [2], 0.7, device)
    assert len({tuple(one.tokens) for group in together for one in group}) > 20
    for i, prompt in enumerate(prompts):
        for j in range(5):
            ((alone,),) = generation.write(made.model, [prompt], keys[i : i + 1, j : j + 1], 12, [2], 0.7, device)
            assert np.array_equal(alone.tokens, together[i][j].tokens) and alone.ended == together[i][j].ended
    plain = _naive(made.model, prompts[0], keys[0, 0], 12, 0.7)
    assert plain[: len(together[0][0].tokens)] == together[0][0].tokens.tolist()


def _naive(model: Any, prompt: Any, key: Any, most: int, temperature: float) -> list[int]:
    from finetune_trainer.modelling.attention import Documents

    model.outer.eval()  # GPT-2 has dropout
    tokens, said = prompt.tolist(), []
    while len(said) < most:
        documents = Documents.of([len(tokens)], torch.device("cpu"))
        with torch.no_grad():
            output = model.inner(
                input_ids=torch.tensor([tokens]), position_ids=torch.arange(len(tokens))[None], documents=documents, use_cache=False
            )  # fmt: skip
        noise = generation.gumbel(
            torch.tensor([key.astype(np.int64)]), torch.tensor(len(said)), output.logits.shape[-1]
        )
        said.append(int((output.logits[0, -1].double() / temperature + noise[0]).argmax()))
        tokens.append(said[-1])
    return said


WINDOWS = {
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 8},
}
"""Shorter than the prompts."""


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "mistral", "olmoe", "phi3", "qwen3"])
def test_a_cache_that_stays_in_place_changes_nothing(tmp_path: Path, family: str) -> None:
    """Prompts of unlike lengths, with answers through two sizes of what attention looks at of it."""
    model = tiny.make_model(tmp_path / "model", family, **WINDOWS.get(family, {}))
    made = loaded(make(tmp_path, model, {"lora": {}}), tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 259, size).astype(np.int64) for size in (1, 60, 31)]
    keys = answer_keys(1, 0, np.arange(3), 2)
    together = generation.write(made.model, prompts, keys, 12, [2], 1.0, torch.device("cpu"))
    for prompt, key, group in zip(prompts, keys[:, 1], together, strict=True):
        plain = _naive(made.model, prompt, key, 12, 1.0)
        assert plain[: len(group[1].tokens)] == group[1].tokens.tolist()
    assert max(len(one.tokens) for group in together for one in group) > 64 - 60


def test_rows_of_added_tokens_are_put_in_place_once(tmp_path: Path) -> None:
    """For a head of its own; afterwards nothing has moved, and the rows are trained as before."""
    model = tiny.make_model(tmp_path / "model", tie_word_embeddings=False)
    made = loaded(make(tmp_path, model, {"lora": {}}, model={"addTokens": {"tokens": ["<red>"]}}), tmp_path)
    with torch.no_grad():
        made.masters.weights.add_(0.1 * torch.randn_like(made.masters.weights))
    prompts, keys = [np.array([259, 70, 80], np.int64)], answer_keys(1, 0, np.arange(1), 1)
    before = {name: tensor.clone() for name, tensor in made.model.outer.state_dict().items()}
    copies = Copies()
    with copies:
        ((one,),) = generation.write(made.model, prompts, keys, 12, [2], 1.0, torch.device("cpu"))
    assert len(one.tokens) > 4 >= copies.number, "of embedding and head, there and back"
    assert one.tokens.tolist() == _naive(made.model, prompts[0], keys[0, 0], 12, 1.0)[: len(one.tokens)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.outer.state_dict().items())


class Copies(TorchDispatchMode):
    """Counts how often rows are put into a matrix."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += "index_copy" in str(func)
        return func(*args, **(kwargs or {}))


def test_noise_is_standard_gumbel_noise() -> None:
    """By its mean and variance; of each key and place its own."""
    noise = generation.gumbel(
        torch.from_numpy(answer_keys(1, 2, np.arange(8), 8).reshape(-1).view(np.int64)), torch.tensor(3), 2000
    )
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.var()) - 1.6449) < 0.04
    assert len(noise.unique()) == noise.numel()
    other = generation.gumbel(torch.tensor([7]), torch.tensor(4), 2000)
    assert not torch.isin(other, noise).any()


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_losses_do_not_depend_on_batching_and_ranks(tmp_path: Path, llama: Path, loss: str) -> None:
    """Steps of five prompts leave ranks unequal parts; answers are written three or sixteen at a time. One of the judges judges some of them."""
    found = {}
    some = {"name": "some", "weight": "0.1", "entryPoint": "tests.training.judges:capitals", "allowUserCode": True}
    for size, world, written in ((5, 1, 16), (1, 1, 3), (2, 2, 8)):
        folder = tmp_path / f"{size}-{world}"
        grpo = {
            "loss": loss,
            "scaleRewards": "batch",
            "generationBatchSize": written,
            "iterations": 2,
            "beta": "0.05",
            "rewards": [VOWELS, some],
        }
        job = make(folder, llama, {"lora": {}}, grpo=grpo, training={"maxSteps": 3, "batchSize": 5, "microBatchSize": size, "learningRate": "1e-3"})  # fmt: skip
        verdict = run_ranks(job, folder, world)
        assert verdict.code == 0, verdict.message
        found[folder] = [{name: value for name, value in line.items() if name != "loss_hex"} for line in lines(folder)]
    first, *others = found.values()
    assert all({"reward", "reward_vowel", "reward_some", "reward_std", "frac_reward_zero_std", "kl", "clip_ratio", "truncated", "completion_length"} <= set(line) for line in first if "loss" in line)  # fmt: skip
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)


def test_the_model_has_not_moved_before_the_first_step(tmp_path: Path, llama: Path) -> None:
    """Its divergence from the reference, the adapter switched off, is nothing at first, and something later."""
    found = trained(tmp_path, llama, {"lora": {}}, grpo={"beta": "0.1"}, training={"maxSteps": 3})
    steps = [line for line in found if "loss" in line]
    assert steps[0]["kl"] == 0 < steps[-1]["kl"]


def test_groups_whose_answers_are_equally_good_teach_nothing(tmp_path: Path, llama: Path) -> None:
    grpo = {"rewards": [{"name": "any", "regex": {"pattern": ".*", "match": "full"}}]}
    found = trained(tmp_path, llama, {"lora": {}}, grpo=grpo, training={"maxSteps": 2})
    steps = [line for line in found if "loss" in line]
    assert all(line["frac_reward_zero_std"] == 1 and line["grad_norm"] == line["loss"] == 0 for line in steps)


def test_the_speed_of_generation_is_told_in_status_alone(tmp_path: Path, llama: Path) -> None:
    job = make(tmp_path, llama, {"lora": {}}, training={"maxSteps": 1})
    verdict = train.run(job, tiny.context(job, tmp_path / "scratch"))
    assert verdict.code == 0, verdict.message
    told = {metric.name: float(metric.value) for metric in verdict.metrics}
    assert told["generated_tokens_per_second"] > 0 and told["eval_reward"] >= 0
    assert not any("second" in name for line in lines(tmp_path) for name in line)


def test_a_judge_that_fails_stops_all_ranks_with_its_name(tmp_path: Path, llama: Path) -> None:
    """And nothing of what it said; one of the two ranks has no prompt."""
    rewards = [{"name": "f", "entryPoint": "tests.training.judges:fails", "allowUserCode": True}]
    spec = {"rows": [{"prompt": "red"}], "dataset": {"evaluation": {"fraction": "0"}}}
    job = make(
        tmp_path, llama, {"lora": {}}, grpo={"rewards": rewards}, training={"maxSteps": 1, "batchSize": 1}, **spec
    )
    verdict = run_ranks(job, tmp_path, 2)
    others = [Verdict.model_validate_json((tmp_path / f"verdict-{rank}.json").read_bytes()) for rank in (0, 1)]
    for one in (verdict, *others):
        assert one.code == ExitCode.USER_ERROR and "f failed with KeyError" in (one.message or "")
        assert SECRET not in one.model_dump_json()


def test_intervals_are_rounded_up_to_where_new_answers_come(tmp_path: Path, llama: Path) -> None:
    job = make(tmp_path, llama, {"lora": {}}, grpo={"iterations": 4}, checkpoints={"everySteps": 3}, evaluation={"everySteps": 5})  # fmt: skip
    assert (job.spec.checkpoints.every_steps, job.spec.evaluation.every_steps) == (4, 8)
    assert job.spec.evaluation.metric == "eval_reward"


def test_rows_are_prompts(tmp_path: Path, llama: Path) -> None:
    """Up to where the assistant begins, and what is too long loses its beginning; text and messages alike."""
    rows = [{"prompt": "red"}, {"prompt": [{"role": "user", "content": "red"}]}, {"prompt": "red " * 40}]
    job = make(tmp_path, llama, {"lora": {}}, rows=rows, training={"sequenceLength": 74})
    prepared: RowSet = loaded(job, tmp_path).rows
    texts = [bytes_of(prepared, i) for i in range(3)]
    assert texts[0] == texts[1] == "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"
    assert list(prepared.lengths[:3]) == [prepared.lengths[0], prepared.lengths[0], 64]
    assert texts[2].endswith("<|im_start|>assistant\n") and prepared.truncated[2]
    assert json.loads(prepared.note(1))["asked"] == rows[1]["prompt"]


def bytes_of(rows: RowSet, row: int) -> str:
    text: str = tiny.tokenizer().decode(rows.tokens[rows.offsets[row] : rows.offsets[row + 1]])
    return text


@pytest.mark.parametrize(
    ("grpo", "rows", "sentence"),
    [
        ({"rewards": [{"name": "r", "regex": {"pattern": "("}}]}, None, "r: pattern is no regular expression"),
        ({"rewards": [{"name": "s", "jsonSchema": {"schema": '{"type": 3}'}}]}, None, "s: schema is no JSON schema, at /type"),
        ({"rewards": [{"name": "s", "jsonSchema": {"schema": "type: object"}}]}, None, "s: schema is not JSON"),
        ({"rewards": [{"name": "f", "entryPoint": "no.such:f", "allowUserCode": True}]}, None, "entryPoint no.such:f cannot be imported (ModuleNotFoundError)"),
        ({"rewards": [{"name": "f", "entryPoint": "math:pi", "allowUserCode": True}]}, None, "math:pi is no function"),
        ({"rewards": [{"name": "f", "entryPoint": "tests.training.judges:fails", "allowUserCode": True}]}, None, "objective.grpo.rewards: f failed with KeyError"),
        ({"rewards": [{"name": "f", "entryPoint": "tests.training.judges:infinite", "allowUserCode": True}]}, None, "f gave something else than a finite number or None"),
        ({"rewards": [{"name": "f", "entryPoint": "tests.training.judges:short", "allowUserCode": True}]}, None, "f gave 1 numbers for 16 completions"),
        ({"rewards": [{"name": "a", "reference": {"column": "answer"}}]}, None, "row 1: column 'answer', which objective.grpo.rewards names"),
        ({"maxCompletionLength": 1024}, None, "maxCompletionLength 1024 leaves none of 1024 tokens"),
        ({}, [{"messages": [{"role": "assistant", "content": "x"}]}], "row 1: column 'messages' holds nothing to answer"),
        ({}, [{"text": "x"}], "rows of format text do not fit objective grpo"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused(
    tmp_path: Path, llama: Path, grpo: dict[str, Any], rows: Any, sentence: str
) -> None:
    job = make(tmp_path, llama, {"lora": {}}, grpo=grpo, rows=rows, dataset={"evaluation": {"fraction": "0"}})
    verdict = train.run(job, tiny.context(job, tmp_path / "scratch"))
    assert verdict.code in (ExitCode.USER_ERROR, ExitCode.DATA_ERROR)
    assert sentence in (verdict.message or "")
