"""objective.grpo against TRL's GRPOTrainer, which is given our answers and makes everything else of them itself: rewards, advantages,
log-probabilities before and of the reference, loss, gradient and update."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers

from finetune_trainer.objectives.grpo import Grpo
from finetune_trainer.train import run

from . import judges, tiny
from .test_grpo import prompts
from .test_parity import lora

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

Group = tuple[list[int], list[list[int]]]
"""A prompt, and its answers."""
GROUPS, ANSWERS, LONGEST = 3, 4, 10


class Case(NamedTuple):
    """What we call it, and what TRL does."""

    grpo: dict[str, Any]
    options: dict[str, Any] = {}
    method: str = "full"
    rate: str = "3e-3"
    some: bool = False
    """Whether judges judge only some of the answers."""


CASES = {
    "dapo, lora, beta": Case({"beta": "0.2"}, {"beta": 0.2}, "lora", "2e-2"),
    "dapo, iterations": Case(
        {"iterations": 2, "epsilon": "0.01", "epsilonHigh": "0.02", "temperature": "0.7"},
        {"num_iterations": 2, "epsilon": 0.01, "epsilon_high": 0.02, "temperature": 0.7},
    ),
    "grpo, iterations, lora, beta": Case(
        {"loss": "grpo", "iterations": 2, "beta": "0.1", "scaleRewards": "batch"},
        {"loss_type": "grpo", "num_iterations": 2, "beta": 0.1, "scale_rewards": "batch"}, "lora", "2e-2",
    ),
    "None": Case({}, some=True),
    "None, batch, lora": Case({"scaleRewards": "batch"}, {"scale_rewards": "batch"}, "lora", "2e-2", some=True),
    "dr_grpo": Case({"loss": "dr_grpo"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_those_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Four steps, in micro-batches of two prompts of three; TRL takes all at once."""
    grpo, options, method, rate, some = CASES[case]
    model = tiny.make_model(tmp_path / "model", initializer_range=0.1)
    rewards = [
        {"name": "vowel", "regex": {"pattern": "[aeiou]"}},
        {"name": "letter", "weight": "-0.5", "regex": {"pattern": "[A-Z]"}},
    ]
    if some:
        rewards = [
            {"name": name, "weight": weight, "entryPoint": f"tests.training.judges:{name}", "allowUserCode": True}
            for name, weight in (("vowels", "1"), ("capitals", "-0.5"))
        ]
    data = tiny.write_rows(tmp_path / "train.jsonl", prompts(12))
    training = {"maxSteps": 4, "batchSize": GROUPS, "microBatchSize": 2, "learningRate": rate, "schedule": "constant",
                "warmupSteps": 0, "weightDecay": "0"}  # fmt: skip
    job = tiny.job(
        tmp_path, model, data, training=training, method={method: {"rank": 4, "alpha": 8} if method == "lora" else {}},
        objective={"grpo": {"rewards": rewards, "generations": ANSWERS, "maxCompletionLength": LONGEST, **grpo}},
    )  # fmt: skip
    written: list[list[Group]] = []
    begin_step = Grpo.begin_step

    def recorded(self: Grpo, model: Any, rows: Any, step: Any, own: Any, ranks: Any, number: int = 0) -> None:
        begin_step(self, model, rows, step, own, ranks, number)
        if self.may_stop(number):
            written.append(
                [
                    (rows.tokens[rows.offsets[row] : rows.offsets[row + 1]].tolist(), [one.written.tokens.tolist() for one in group])
                    for row, group in self._groups.items()
                ]
            )  # fmt: skip

    monkeypatch.setattr(Grpo, "begin_step", recorded)
    verdict = run(job, tiny.context(job, tmp_path / "scratch"))
    assert verdict.code == 0, verdict.message
    ours = [json.loads(line) for line in (tmp_path / "output/metrics.jsonl").read_text().splitlines()]
    functions = [judges.vowels, judges.capitals] if some else [vowel, letter]
    theirs = trl_steps(model, written, float(rate), options, method, functions, tmp_path / "trl")
    assert len(written) == 4 // grpo.get("iterations", 1) and len(ours) == len(theirs) == 4
    assert max(abs(line["loss"]) for line in theirs) > 0.001
    for name in theirs[0].keys() - ({"truncated"} if some else set()):  # one ends in padding, which ends it for TRL
        np.testing.assert_allclose(
            [line[name] for line in ours], [line[name] for line in theirs], rtol=0, atol=1e-5, err_msg=name
        )
    if "epsilon" in grpo:
        assert ours[1]["clip_ratio"] > 0


def vowel(completions: list[str], **_: Any) -> list[float]:
    return [float(bool(re.search("[aeiou]", text))) for text in completions]


def letter(completions: list[str], **_: Any) -> list[float]:
    return [float(bool(re.search("[A-Z]", text))) for text in completions]


def trl_steps(
    folder: Path,
    written: list[list[Group]],
    rate: float,
    options: dict[str, Any],
    method: str,
    functions: list[Any],
    out: Path,
) -> list[dict[str, float]]:
    """Of each of TRL's steps the loss, the gradient's norm and what it says of the answers."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    steps: list[dict[str, float]] = []
    generations = iter(written)

    class Given(GRPOTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, *_: Any) -> Any:
            groups = next(generations)
            self.asked = [prompt for prompt, answers in groups for _ in answers]
            return [answer for _, answers in groups for answer in answers], None

        def _generate(self, prompts: Any) -> Any:
            _, *rest = super()._generate(prompts)
            return self.asked, *rest

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            said = {name: values[-1] for name, values in self._metrics["train"].items()}
            named = {
                "loss": float(loss), "reward": said["reward"],
                "completion_length": said["completions/mean_length"],
                "truncated": said["completions/clipped_ratio"],
                "clip_ratio": said["clip_ratio/region_mean"],
                **{f"reward_{function.__name__}": said[f"rewards/{function.__name__}/mean"] for function in functions},
            }  # fmt: skip
            steps.append(named | ({"kl": said["kl"]} if "kl" in said else {}))
            return loss

    torch.manual_seed(42)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = GROUPS * ANSWERS
    trainer = Given(
        model=lora()(model) if method == "lora" else model,
        reward_funcs=functions,
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_list([{"prompt": "red"}] * 32),
        args=GRPOConfig(
            output_dir=str(out), per_device_train_batch_size=rows, max_steps=4, learning_rate=rate, lr_scheduler_type="constant",
            weight_decay=0.0, max_grad_norm=1.0, num_generations=ANSWERS, max_completion_length=LONGEST, report_to=[], save_strategy="no",
            logging_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=42,
            reward_weights=[1.0, -0.5], steps_per_generation=1, **options,
        ),
    )  # fmt: skip
    trainer.train()
    return steps
