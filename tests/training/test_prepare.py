"""The prepared set: its digest, what is held out, what is cut, and that it is made once."""

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_crds.resolved import ResolvedFineTune
from finetune_trainer.data import prepare as prepare_module
from finetune_trainer.data.holdout import Division, divide
from finetune_trainer.data.prepare import Dataset, prepare
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.errors import DataError, UserError
from finetune_trainer.storage.sources import source_files

from . import tiny


def prepared(
    folder: Path, rows: list[dict[str, Any]], *, tokenizer: Any = None, name: str = "a.jsonl", **spec: Any
) -> RowSet:
    data = tiny.write_rows(folder / name, rows)
    job = tiny.job(folder, Path("/model"), data, **{"training": {"sequenceLength": 1024}, **spec})
    held_out = job.spec.dataset.evaluation
    files = Dataset(
        [source_files(source, folder / "in") for source in job.spec.dataset.train],
        [source_files(source, folder / "in") for source in (held_out and held_out.sources) or []],
        [],
    )
    return prepare(job.spec, files, tokenizer or tiny.tokenizer(), folder / "prepared")


def divided(rows: RowSet, **evaluation: Any) -> Division:
    job = tiny.job(Path("/f"), Path("/m"), Path("/d"), dataset={"evaluation": evaluation or None})
    assert isinstance(job.spec, ResolvedFineTune)
    return divide(job.spec, rows)


CHANGES: dict[str, Any] = {
    "content": {"rows": tiny.chat_rows(20, seed=8)},
    "length": {"training": {"sequenceLength": 200}},
    "template": {"tokenizer": tiny.tokenizer(tiny.CHATML + " ")},
    "loss on": {"objective": {"sft": {"lossOn": "all"}}},
    "fraction": {"dataset": {"evaluation": {"fraction": "0.5"}}},
    "name": {"name": "b.jsonl"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_names_content_and_preparation(tmp_path: Path, change: str) -> None:
    rows = tiny.chat_rows(20)
    first = prepared(tmp_path, rows)
    assert prepared(tmp_path, rows).index.digest == first.index.digest
    options = {"rows": rows} | CHANGES[change]
    assert prepared(tmp_path, options.pop("rows"), **options).index.digest != first.index.digest


def test_what_does_not_change_the_rows_does_not_change_the_digest(tmp_path: Path) -> None:
    rows = tiny.chat_rows(20)
    first = prepared(tmp_path, rows)
    again = prepared(
        tmp_path,
        rows,
        training={"seed": 1, "learningRate": "1", "packing": False, "batchSize": 3, "sequenceLength": 1024},
    )
    assert again.index.digest == first.index.digest
    assert len(list((tmp_path / "prepared").iterdir())) == 1


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times as many: the peak grows by numbers of each row (its length, digest, place), not by its text and tokens."""
    monkeypatch.setattr(prepare_module, "BATCH_ROWS", 32)
    peaks = []
    for count in (100, 400):
        texts = [{"text": f"{i} " + "red stone " * 60} for i in range(count)]
        tiny.write_rows(tmp_path / str(count) / "a.jsonl", texts)
        tracemalloc.start()
        prepared(tmp_path / str(count), texts)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 300 * 400, peaks


def test_a_half_written_set_is_made_anew(tmp_path: Path) -> None:
    rows = tiny.chat_rows(20)
    first = prepared(tmp_path, rows)
    tokens = first.tokens.tolist()
    folder = next((tmp_path / "prepared").iterdir())
    (folder / "index.json").unlink()
    (folder / "tokens.bin").write_bytes(b"")
    assert prepared(tmp_path, rows).tokens.tolist() == tokens


def test_rows_are_held_out_by_content(tmp_path: Path) -> None:
    rows = tiny.chat_rows(200)
    few = prepared(tmp_path / "few", [*rows[:150], *rows[:50]])
    many = prepared(tmp_path / "many", rows)
    (train, held_out, *_), (_, held_out_of_many, *_) = divided(few, fraction="0.2"), divided(many, fraction="0.2")
    assert len(train) + len(held_out) == 200
    assert 0.1 < len(held_out_of_many) / 200 < 0.3
    content = few.content
    assert not set(content[train]) & set(content[held_out]), "equal rows stay on one side"
    assert set(content[held_out]) <= set(many.content[held_out_of_many]), "a row stays on its side as the set grows"


def test_at_least_one_row_is_held_out(tmp_path: Path) -> None:
    train, held_out, *_ = divided(prepared(tmp_path, tiny.chat_rows(5)), fraction="1e-9")
    assert (len(train), len(held_out)) == (4, 1)


@pytest.mark.parametrize(("rows", "held_out"), [(5, 0), (50, 5), (400, 16), (2000, 40)])
def test_some_rows_are_held_out_when_nobody_says(tmp_path: Path, rows: int, held_out: int) -> None:
    """2 %, at least 16, never more than a tenth."""
    texts = [{"text": f"{i}"} for i in range(rows)]
    train, chosen, *_ = divided(prepared(tmp_path, texts))
    assert (len(train), len(chosen)) == (rows - held_out, held_out)


def test_rows_that_are_all_alike_are_not_held_out_unasked(tmp_path: Path) -> None:
    train, held_out, *_ = divided(prepared(tmp_path, [{"text": "same"}] * 40))
    assert (len(train), len(held_out)) == (40, 0)


def test_rows_of_a_group_stay_together(tmp_path: Path) -> None:
    texts = [{"text": f"{i}", "customer": i % 20} for i in range(200)]
    evaluation = {"fraction": "0.3", "groupBy": "customer"}
    rows = prepared(tmp_path, texts, dataset={"evaluation": evaluation})
    train, held_out, *_ = divided(rows, **evaluation)
    sides = [{(int(rows.numbers[i]) - 1) % 20 for i in side} for side in (train, held_out)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    with pytest.raises(DataError, match=r"row 1: no column 'client', which dataset.evaluation.groupBy names"):
        prepared(tmp_path / "2", texts, dataset={"evaluation": {"groupBy": "client"}})


def test_a_slice_by_a_column_that_no_row_to_evaluate_on_has_is_refused(tmp_path: Path) -> None:
    texts = [{"text": f"{i}", "region": "eu"} for i in range(10)]
    held_out = tiny.write_rows(tmp_path / "held.jsonl", [{"text": "x", "area": "eu"}, {"text": "y", "id": 1}])
    spec: dict[str, Any] = {"evaluation": {"slices": [{"name": "eu", "column": "region", "value": "eu"}]}}
    assert prepared(tmp_path, texts, **spec).slices.all()
    with pytest.raises(
        UserError, match=r"slices eu: no row to evaluate on has a column 'region' \(columns: text, area, id\)"
    ):
        prepared(tmp_path, texts, dataset={"evaluation": {"sources": [{"uri": f"file://{held_out}"}]}}, **spec)


def test_a_set_of_its_own_is_only_evaluated_on(tmp_path: Path) -> None:
    other = tiny.write_rows(tmp_path / "held.jsonl", tiny.chat_rows(7, seed=1))
    rows = prepared(tmp_path, tiny.chat_rows(20), dataset={"evaluation": {"sources": [{"uri": f"file://{other}"}]}})
    train, held_out, *_ = divided(rows, sources=[{"uri": f"file://{other}"}])
    assert (len(train), len(held_out)) == (20, 7)
    assert rows.place(int(held_out[0])).endswith("held.jsonl row 1")


def test_long_rows_are_cut_and_counted(tmp_path: Path) -> None:
    whole = prepared(tmp_path / "whole", tiny.chat_rows(50), training={"sequenceLength": 1000})
    limit = int(np.quantile(whole.lengths, 0.9))
    cut = prepared(tmp_path / "cut", tiny.chat_rows(50), training={"sequenceLength": limit})
    assert cut.lengths.max() == limit
    assert int(cut.truncated.sum()) == int((whole.lengths > limit).sum()) > 0
    assert not whole.truncated.any()


def test_rows_with_nothing_to_learn_are_named(tmp_path: Path) -> None:
    rows = tiny.chat_rows(10)
    rows[3] = {"messages": [{"role": "user", "content": "secret"}]}
    rows[7] = {"messages": [{"role": "user", "content": "secret"}]}
    with pytest.raises(
        DataError, match=r"2 of 10 rows have no token to learn .*a.jsonl row 4, .*a.jsonl row 8\)"
    ) as raised:
        prepared(tmp_path, rows)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(["b", "a", "b"], ["a", "b"]), ([10, 9, 10], ["9", "10"]), (["10", "9", "x"], ["10", "9", "x"])],
)
def test_classes_do_not_depend_on_the_order_of_rows(tmp_path: Path, labels: list[Any], classes: list[str]) -> None:
    rows = prepared(
        tmp_path, [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)], task="text-classification"
    )
    assert rows.index.classes == classes
    assert [classes[int(i)] for i in rows.labels] == [str(label) for label in labels]


def test_one_class_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 class in all rows"):
        prepared(tmp_path, [{"text": "t", "label": "a"}] * 3, task="text-classification")


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset.train: the files hold no rows"):
        prepared(tmp_path, [])


def test_formats_may_differ_from_file_to_file(tmp_path: Path) -> None:
    other = tiny.write_rows(tmp_path / "b.jsonl", [{"text": "one two"}])
    first = tiny.write_rows(tmp_path / "a.jsonl", tiny.chat_rows(3))
    job = tiny.job(
        tmp_path,
        Path("/model"),
        [{"uri": f"file://{first}", "weight": "1"}, {"uri": f"file://{other}", "weight": "2"}],
        training={"sequenceLength": 1024},
    )
    files = Dataset([source_files(source, tmp_path / "in") for source in job.spec.dataset.train], [], [])
    rows = prepare(job.spec, files, tiny.tokenizer(), tmp_path / "prepared")
    assert rows.sources.tolist() == [0, 0, 0, 1]
    assert rows.place(3).endswith("b.jsonl row 1")


def test_classes_of_a_saved_set_have_their_names(tmp_path: Path) -> None:
    """A folder of save_to_disk, whose splits are found without a word."""
    from datasets import ClassLabel, DatasetDict, Features, Value
    from datasets import Dataset as Saved

    features = Features({"text": Value("string"), "label": ClassLabel(names=["ham", "spam"])})
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(6)]
    both = {"train": Saved.from_list(rows[:4], features), "test": Saved.from_list(rows[4:], features)}
    DatasetDict(both).save_to_disk(tmp_path / "saved")
    source = {"uri": f"file://{tmp_path}/saved"}
    dataset = {"evaluation": {"sources": [source]}}
    job = tiny.job(
        tmp_path, Path("/model"), [source], task="text-classification", dataset=dataset, training={"sequenceLength": 64}
    )
    reading = [
        source_files(source, tmp_path, evaluation=held_out)
        for held_out in (False, True)
        for source in job.spec.dataset.train
    ]
    found = prepare(job.spec, Dataset(reading[:1], reading[1:], []), tiny.tokenizer(), tmp_path / "prepared")
    assert found.index.classes == ["ham", "spam"]
    assert found.labels.tolist() == [0, 1, 0, 1, 0, 1] and found.sources.tolist() == [0, 0, 0, 0, -1, -1]


def test_a_source_that_was_read_in_part_keeps_its_share_of_a_budget(tmp_path: Path) -> None:
    """Of two sources of equal size, one is all there and a tenth of the other: rows of that stand for ten."""
    other = tiny.write_rows(tmp_path / "b.jsonl", [{"text": f"{i:04}"} for i in range(100)])
    first = tiny.write_rows(tmp_path / "a.jsonl", [{"text": f"{i:04}"} for i in range(1000)])
    job = tiny.job(
        tmp_path,
        Path("/m"),
        [{"uri": f"file://{one}"} for one in (first, other)],
        dataset={"tokenBudget": 1000},
        training={"sequenceLength": 64},
    )
    files = Dataset([source_files(source, tmp_path) for source in job.spec.dataset.train], [], [])
    rows = prepare(job.spec, files, tiny.tokenizer(), tmp_path / "prepared")
    parts = dataclasses.replace(rows, index=rows.index.model_copy(update={"shares": {1: 0.1}}))
    shares = []
    for one in (rows, parts):
        chosen = rows.sources[divide(job.spec, one).train]
        shares.append((chosen == 1).mean())
    assert shares[0] < 0.2 and shares[1] > 0.3, shares
