"""Trained weights that ranks divide: whatever the partition, each weight is somebody's, and what is computed is what one rank alone computes, bit for bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finetune_crds.resolved import ResolvedAdamW, ResolvedJob
from finetune_crds.verdict import ExitCode
from finetune_trainer.modelling import masters, partition
from finetune_trainer.modelling.masters import Group, Masters
from finetune_trainer.modelling.partition import Partition
from finetune_trainer.ranks import Ranks

from . import tiny
from .runs import published
from .spawn import on_ranks, run_ranks


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [256, 1024, 256 * 37, 256 * 1000])
@pytest.mark.parametrize("chunk", [1, 4096, 1 << 30])
def test_each_weight_is_of_one_rank(world: int, length: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "CHUNK", chunk)
    every = [Partition(length, rank, world) for rank in range(world)]
    assert len({(one.size, one.length) for one in every}) == 1 and every[0].length * world == every[0].size
    assert length <= every[0].size < length + world * 256
    for start, end in ((0, every[0].size), (256, length), (0, 256), (length - 256, length), (300, 301), (256, 256)):
        owners = torch.zeros(every[0].size, dtype=torch.int64)
        for one in every:
            held = torch.zeros(one.length, dtype=torch.int64)
            for part in one.owned(start, end):
                assert part.whole[1] - part.whole[0] == part.own[1] - part.own[0] > 0
                owners[slice(*part.whole)] += 1
                held[slice(*part.own)] += 1
            assert held.max() <= 1
        expected = torch.zeros_like(owners)
        expected[start:end] = 1
        assert torch.equal(owners, expected)


class Small(nn.Module):
    """Weights of sizes that are no whole blocks, a norm that stays in fp32, and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = nn.Embedding(77, 13)
        self.hidden = nn.Linear(13, 301)
        self.norm = nn.BatchNorm1d(301)
        self.frozen = nn.Linear(3, 3)
        self.head = nn.Linear(301, 5, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.frozen.requires_grad_(False)


GROUPS = [
    Group(("head.weight",)),
    Group(("hidden.weight", "hidden.bias", "norm.weight", "norm.bias"), rate=0.5, start=1),
    Group(("embedding.weight",), rate=0.1, start=3),
]
STEPS = 5


def made(ranks: Ranks, *, norms: bool, bits: int, compute: torch.dtype) -> tuple[nn.Module, Masters]:
    model = Small()
    groups = GROUPS
    if not norms:
        model.norm.requires_grad_(False)
        groups = [Group(tuple(name for name in one.names if "norm" not in name), one.rate, one.start) for one in GROUPS]
    settings = ResolvedAdamW.model_validate(
        {"beta1": "0.9", "beta2": "0.99", "epsilon": "1e-8", "bits": bits, "paged": False}
    )
    return model, Masters(model, compute, settings, groups, pull=0.1, fresh=("head",), ranks=ranks)


def trained(ranks: Ranks, model: nn.Module, made: Masters, steps: range) -> None:
    """Steps whose gradients are drawn: of a rank its share of them, the sum of which is exact."""
    for step in steps:
        made.begin(step)
        for micro in range(2 if ranks.first else 1):
            generator = torch.Generator().manual_seed(100 * step + micro)
            loss = torch.zeros(())
            for parameter in model.parameters():
                slope = torch.randn(parameter.shape, generator=generator).bfloat16()
                share = (
                    0.5 if ranks.world > 1 and not micro else 1.0
                )  # the first pass is every rank's half, the second of the first alone
                if parameter.requires_grad:
                    loss = loss + (parameter * (share * slope).to(parameter.dtype)).float().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            made.collect()
        if ranks.first:  # as the forward passes of normalisation count, of which the ranks have not as many
            model.norm.num_batches_tracked += 1  # type: ignore[operator]
        made.add_up(0 if ranks.first else 1)
        made.step(step, [0.01, 0.005, 0.001], 0.1, scale=0.5)


def everything(folder: Path) -> dict[str, Tensor]:
    """What ranks have saved of a state."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.pt"):
        part = torch.load(file)
        assert not found.keys() & part.keys()
        found |= part
    return found


def keep(folder: Path, ranks: Ranks, model: nn.Module, made: Masters) -> None:
    folder.mkdir(exist_ok=True)
    state = {name: tensor.clone() for name, tensor in made.state()}
    state |= {f"{ranks.rank} {name}": parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.save(state, folder / f"{ranks.rank}.pt")
    found = made.trained()
    assert found.keys() == (set(made.names) if ranks.first else set()) | made.buffers.keys()
    assert all(torch.equal(tensor, state.get(f"weight/{name}", tensor)) for name, tensor in found.items())


@pytest.mark.parametrize("most", [masters.WHOLE_GRADIENT, 0], ids=["whole", "divided"])
@pytest.mark.parametrize("chunk", [1, 1 << 26])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("norms", "bits"), [(True, 32), (False, 32), (False, 8)])
def test_two_ranks_compute_what_one_does(
    tmp_path: Path, most: int, chunk: int, compute: torch.dtype, norms: bool, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments, scales and what the model sees, in stages, with a pull and decay; and again on two ranks that resume on the way."""
    monkeypatch.setattr(partition, "CHUNK", chunk)
    monkeypatch.setattr(masters, "WHOLE_GRADIENT", most)

    def whole(name: str) -> Callable[[Ranks], None]:
        def work(ranks: Ranks) -> None:
            model, weights = made(ranks, norms=norms, bits=bits, compute=compute)
            trained(ranks, model, weights, range(STEPS))
            keep(tmp_path / name, ranks, model, weights)

        return work

    def stopped(ranks: Ranks) -> None:
        model, weights = made(ranks, norms=norms, bits=bits, compute=compute)
        trained(ranks, model, weights, range(2))
        keep(tmp_path / "half", ranks, model, weights)

    def resumed(ranks: Ranks) -> None:
        model, weights = made(ranks, norms=norms, bits=bits, compute=compute)
        state = {name: tensor for name, tensor in everything(tmp_path / "half").items() if "/" in name}
        with pytest.raises(KeyError):
            weights.load(list(state.items())[1:])
        weights.load(state.items())
        trained(ranks, model, weights, range(2, STEPS))
        keep(tmp_path / "resumed", ranks, model, weights)

    whole("alone")(Ranks())
    for work in (whole("two"), stopped, resumed):
        on_ranks(2, work)
    alone, two, again = (everything(tmp_path / name) for name in ("alone", "two", "resumed"))
    assert any("-scales/" in name for name in alone) == (bits == 8)
    for name, tensor in alone.items():
        for found in (two, again):
            assert torch.equal(found[name], tensor), name
    for found in (two, again):
        assert found.keys() == alone.keys() | {name.replace("0 ", "1 ") for name in alone if name.startswith("0 ")}
        assert all(torch.equal(found[name], found[f"0 {name[2:]}"]) for name in found if name.startswith("1 "))


def deep(rank: int, world: int) -> tuple[nn.Module, Masters]:
    """Sixteen layers on the meta device, where nobody is met."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))
    settings = ResolvedAdamW.model_validate(
        {"beta1": "0.9", "beta2": "0.99", "epsilon": "1e-8", "bits": 32, "paged": False}
    )
    return model, Masters(model, torch.bfloat16, settings, ranks=Ranks(rank, world, rank, torch.device("meta")))


def test_what_ranks_hold_is_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of a weight that computes in bf16: 2 for the model, and of 16 for training the rank's part."""
    monkeypatch.setattr(masters, "WHOLE_GRADIENT", 0)
    model, made = deep(3, 8)
    held = [made.weights, made.gradient.vector, *made.optimizer.moments.values()]
    assert sum(tensor.nbytes for tensor in held) == 16 * len(made) / 8
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    assert sum({storage._cdata: storage.nbytes() for storage in storages}.values()) == 2 * len(made)


def test_divided_gradients_leave_while_the_backward_pass_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are never those of all weights at a time, and the exchange takes place beside the computation."""
    monkeypatch.setattr(masters, "WHOLE_GRADIENT", 0)
    monkeypatch.setattr(partition, "CHUNK", 2 << 20)  # two layers
    model, made = deep(0, 4)
    made.begin(0)
    there: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: there.append(sum(one.grad is not None for one in model.parameters()))
        )
    for _ in range(2):
        model(torch.zeros(2, 1024, dtype=torch.bfloat16, device="meta")).sum().backward()
        made.collect()
    assert len(there) == 32 and max(there) <= 2


def test_a_gradient_that_comes_twice_is_no_silent_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masters, "WHOLE_GRADIENT", 0)
    model, made = deep(0, 2)
    made.begin(0)
    for _ in range(2):
        model(torch.zeros(2, 1024, dtype=torch.bfloat16, device="meta")).sum().backward()
    with pytest.raises(RuntimeError, match="gradient of a weight twice"):
        made.collect()


METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": {"full": {}}},
    "8 bits": {"method": {"full": {"layerDecay": "0.9"}}, "training": {"optimizer": {"adamw": {"bits": 8}}}},
    "l2Sp": {"method": {"full": {}}, "training": {"l2Sp": "1"}},
    "lora": {"method": {"lora": {"loraPlusRatio": "4"}}},
}


@pytest.mark.parametrize(
    ("name", "most", "far"),
    [("full", 0, True), ("8 bits", 0, False), ("l2Sp", masters.WHOLE_GRADIENT, True), ("lora", 0, False)],
)
def test_a_divided_run_resumes_to_the_same_bytes_and_on_any_number_of_ranks(
    tmp_path: Path, llama: Path, name: str, most: int, far: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, with more than one micro-batch, of which the ranks have not as many, and the best evaluation published."""
    monkeypatch.setattr(partition, "CHUNK", 8192)
    monkeypatch.setattr(masters, "WHOLE_GRADIENT", most)
    if far:
        monkeypatch.setattr(tiny, "open_store", lambda place: tiny.Elsewhere(Path(place.uri.removeprefix("file://"))))

    def job(folder: Path) -> ResolvedJob:
        given = METHODS[name]
        training = {"precision": "bf16", "batchSize": 5, "microBatchSize": 1, "packing": False, "maxSteps": 8}
        return tiny.job(
            folder, llama, tiny.write_rows(folder / "train.jsonl", tiny.chat_rows(12)),
            method=given["method"], training=training | given.get("training", {}),
            dataset={"evaluation": {"fraction": "0.2"}}, evaluation={"everySteps": 2, "publish": "best"},
        )  # fmt: skip

    def finished(folder: Path, before: int, then: int) -> list[float]:
        """Stopped at step 3 on so many ranks, or not, and then finished on so many."""
        if before:
            assert run_ranks(job(folder), folder, before, run_id="first", stop_at=3).code == ExitCode.STOPPED
        verdict = run_ranks(job(folder), folder, then, run_id="second")
        assert verdict.code == 0 and (verdict.first_step >= 3) == bool(before), verdict.message
        return [float.fromhex(loss) for loss in tiny.losses(folder / "output")]

    place = tmp_path / "job"
    alone = finished(place, 0, 1)
    shutil.rmtree(place)
    whole = finished(place, 0, 2)
    bytes_of_whole = published(place)
    shutil.rmtree(place)
    assert finished(place, 2, 2) == whole and published(place) == bytes_of_whole
    for before, then in ((2, 3), (2, 1), (1, 2)):
        shutil.rmtree(place)
        np.testing.assert_allclose(finished(place, before, then), alone, rtol=0, atol=0.02)
    np.testing.assert_allclose(whole, alone, rtol=0, atol=0.02)
