"""Preference objectives against TRL: the same rows in the same order, its own trainers, tokenisation and padding."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers

from finetune_trainer.data.prepared import RowSet
from finetune_trainer.train import run

from . import tiny
from .test_parity import lora, order_of
from .test_preference import feedback, pairs

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


class Case(NamedTuple):
    """A job's objective and method, and what TRL calls them."""

    objective: dict[str, Any]
    options: dict[str, Any] = {}
    method: str = "full"
    rate: str = "1e-3"


CASES = {
    "dpo": Case({"dpo": {}}),
    "dpo, lora": Case({"dpo": {"beta": "0.3"}}, {"beta": 0.3}, "lora", "5e-3"),
    "dpo, ipo": Case({"dpo": {"loss": "ipo", "beta": "1"}}, {"loss_type": "ipo", "beta": 1.0}, rate="3e-4"),
    "dpo, hinge": Case({"dpo": {"loss": "hinge"}}, {"loss_type": "hinge"}),
    "orpo": Case({"orpo": {"beta": "0.5"}}, {"beta": 0.5}),
    "kto": Case({"kto": {"desirableWeight": "0.7"}}, {"desirable_weight": 0.7}),
    "kto, lora": Case({"kto": {}}, method="lora", rate="5e-3"),
    "reward": Case({"reward": {"centering": "0.01"}}, {"center_rewards_coefficient": 0.01}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has no template and begins no text: TRL's trainers do not agree with each other on either."""
    folder = tiny.make_model(tmp_path_factory.mktemp("plain"))
    tokenizer = tiny.tokenizer(template=None)
    tokenizer.bos_token = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_those_of_trl(tmp_path: Path, plain: Path, case: str) -> None:
    """Ten steps of eight rows, in micro-batches that do not divide them; TRL takes the eight at once."""
    objective, options, method, rate = CASES[case]
    (name,) = objective
    rows = feedback(40) if name == "kto" else [row | {"margin": i % 3 / 2} for i, row in enumerate(pairs(40))]
    data = tiny.write_rows(tmp_path / "train.jsonl", rows)
    training = {"epochs": "2", "batchSize": 8, "microBatchSize": 3, "learningRate": rate, "schedule": "constant",
                "warmupSteps": 0, "weightDecay": "0"}  # fmt: skip
    job = tiny.job(
        tmp_path, plain, data, objective=objective, training=training,
        method={method: {"rank": 4, "alpha": 8} if method == "lora" else {}},
    )  # fmt: skip
    verdict = run(job, tiny.context(job, tmp_path / "scratch"))
    assert verdict.code == 0, verdict.message
    ours = [line["loss"] for line in map(json.loads, (tmp_path / "output/metrics.jsonl").read_text().splitlines())]

    order = order_of(RowSet.open(next((tmp_path / "scratch/prepared").iterdir())), 8, seed=42)
    listed = [int(i) for epoch in (0, 1) for step in order.epoch(epoch) for sequence in step for i in sequence]
    theirs = trl_losses(name, plain, rows, listed, float(rate), options, method, tmp_path / "trl")
    assert len(ours) == len(theirs) == 10
    assert max(theirs) - min(theirs) > 0.01, "the reference itself must learn, or equality says little"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def trl_losses(
    name: str, folder: Path, rows: list[dict[str, Any]], order: list[int], rate: float, options: dict[str, Any], method: str, out: Path
) -> list[float]:  # fmt: skip
    """Losses of TRL's trainer over the rows in this order, eight a step."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer_class, config_class = {
        "dpo": (DPOTrainer, DPOConfig), "orpo": (ORPOTrainer, ORPOConfig),
        "kto": (KTOTrainer, KTOConfig), "reward": (RewardTrainer, RewardConfig),
    }[name]  # fmt: skip
    losses: list[float] = []

    class Recorded(trainer_class):  # type: ignore[misc, valid-type]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss))
            return loss

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    kind: Any = transformers.AutoModelForCausalLM
    torch.manual_seed(42)
    if name == "reward":
        kind = transformers.AutoModelForSequenceClassification
        model = kind.from_pretrained(folder, dtype=torch.float32, num_labels=1, pad_token_id=0)
    else:
        model = kind.from_pretrained(folder, dtype=torch.float32)
    trained = lora()(model) if method == "lora" else model
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    listed = [rows[i] | {"prompt": f"{rows[i]['prompt']}\n\n"} for i in order]
    if name != "reward":
        listed = [{key: value for key, value in row.items() if key != "margin"} for row in listed]
    trainer = Recorded(
        model=trained, processing_class=tokenizer, train_dataset=Dataset.from_list(listed),
        args=config_class(
            output_dir=str(out), per_device_train_batch_size=8, num_train_epochs=1, learning_rate=rate, lr_scheduler_type="constant",
            weight_decay=0.0, max_grad_norm=1.0, max_length=1024, report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True,
            bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=42, **options,
        ),
    )  # fmt: skip
    if name == "kto":  # other rows' answers as ours pairs them: of the row before in the file
        answers = [tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id] for row in rows]
        trainer.train_dataset = trainer.train_dataset.map(
            lambda row, at: row | {"KL_completion_ids": answers[order[at] - 1]}, with_indices=True
        )
    trainer.train()
    return losses
