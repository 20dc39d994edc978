"""What bench/results.py measures of text: SmolLM2-135M-Instruct on e-mails, on questions out of them, and on Python's own documentation.

Each function prepares data and returns tasks by name, in order of their worth.
"""

import json
import random
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

from real_data import docstrings, questions, unlike
from result_jobs import Chat, Found, Lab, Task, Work, rows, sources

from cluster.model import SMOLLM2, model_path

READ = 384
"""Tokens of an e-mail that a classifier reads."""
LORA: dict[str, Any] = {"lora": {}}
FULL: dict[str, Any] = {"full": {}}


def _cut(texts: list[str]) -> list[str]:
    """The part of each that has READ tokens, so that all classifiers read the same."""
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model_path(SMOLLM2))
    offsets = tokenizer(texts, truncation=True, max_length=READ, return_offsets_mapping=True)["offset_mapping"]
    return [text[: max((end for _, end in spans), default=0)] for text, spans in zip(texts, offsets, strict=True)]


def classification(lab: Lab) -> dict[str, Task]:
    """Spam or not: tuned on all rows and on few, beside a linear model on words."""
    mails = unlike()
    texts = _cut([mail.text[:6000] for mail in mails])
    listed = [
        {"text": text, "label": "spam" if mail.is_spam else "ham"} for text, mail in zip(texts, mails, strict=True)
    ]
    if lab.small:
        listed = listed[:60]
    held, chosen = lab.size(800, 16), lab.size(300, 16)
    test, validation, train = listed[:held], listed[held : held + chosen], listed[held + chosen :]
    folder = lab.folder / "classification"
    tested, validated = rows(folder / "test.jsonl", test), rows(folder / "validation.jsonl", validation)

    def tuned(method: dict[str, Any], count: int, epochs: int, **training: Any) -> Work:
        def task() -> Found:
            some = rows(folder / f"train-{count}.jsonl", train[:count])
            steps = -(-min(count, len(train)) // 16) * epochs
            return lab.run(
                f"classification-{'-'.join([*method, str(count), *map(str, training.values())])}", some, task="text-classification", method=method,
                dataset={"evaluation": {"sources": sources(validated), "sets": [{"name": "test", "sources": sources(tested)}]}},
                training={"epochs": str(epochs), "microBatchSize": 16, "sequenceLength": READ, **training},
                evaluation={"everySteps": max(1, steps // 6), "metric": "eval_accuracy"},
            )  # fmt: skip

        return task

    def majority() -> Found:
        return {"right": sum(row["label"] == "ham" for row in test), "held_out": len(test), "validation": len(validation), "train": len(train)}  # fmt: skip

    few, some, every = 200, 800, len(train)
    few, some, every = 200, 800, len(train)
    return {
        "classification/majority": Task(0, majority),
        f"classification/lora, {every}": Task(0, tuned(LORA, every, 3)),
        f"classification/full, {every}": Task(0, tuned(FULL, every, 3)),
        **{f"classification/tfidf, {count}": Task(1, lambda count=count: _tfidf(train[:count], validation, test)) for count in (every, some, few)},
        f"classification/lora, {some}": Task(2, tuned(LORA, some, 5)),
        f"classification/lora, {few}": Task(2, tuned(LORA, few, 10)),
        f"classification/full, {few}": Task(2, tuned(FULL, few, 10)),
        f"classification/lora, {every}, seed 1": Task(5, tuned(LORA, every, 3, seed=1)),
    }  # fmt: skip


def _tfidf(train: list[dict[str, str]], validation: list[dict[str, str]], test: list[dict[str, str]]) -> Found:
    """Words and pairs of words, weighed by TF-IDF, and logistic regression whose C is chosen on the validation rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    began = time.process_time()
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    known, labels = words.fit_transform([row["text"] for row in train]), [row["label"] for row in train]

    def scored(model: Any, held: list[dict[str, str]]) -> tuple[float, float]:
        right, guessed = [row["label"] for row in held], model.predict(words.transform([row["text"] for row in held]))
        return sum(guessed == right) / len(held), float(f1_score(right, guessed, average="macro"))

    fitted = [LogisticRegression(C=C, max_iter=2000).fit(known, labels) for C in (1, 10, 100, 1000)]
    best = max(fitted, key=lambda model: scored(model, validation)[0])
    accuracy, f1 = scored(best, test)
    return {
        "after": {"eval_test_accuracy": accuracy, "eval_test_f1": f1},
        "rows": len(train),
        "C": best.C,
        "cpu_seconds": time.process_time() - began,
    }


@cache
def asked(small: bool) -> tuple[list[str], list[str]]:
    """Questions held out, and the others."""
    found = questions()
    random.Random(0).shuffle(found)
    held = 24 if small else 200
    return found[:held], found[held : 40 if small else 1400]


def own_answers(lab: Lab) -> Found:
    """What the model itself says to all questions, 48 tokens each at most."""
    held, others = asked(lab.small)
    listed = held + others
    said = lab.answers("own", None, {"own": [_question(one) for one in listed]}, 48)["own"]
    if lab.small:
        said = [f"{text} It is. So it is said of {i}." for i, text in enumerate(said)]
    (lab.folder / "own.json").write_text(json.dumps(dict(zip(listed, said, strict=True))))
    return {"answers": len(said)}


def _own(lab: Lab) -> dict[str, str]:
    """Waits for them: jobs that learn from them may be asked for before they are there."""
    place = lab.folder / "own.json"
    for _ in range(600):
        if place.exists():
            return dict(json.loads(place.read_text()))
        time.sleep(1)
    raise RuntimeError("the model's own answers never came")


def _question(text: str) -> Chat:
    return [{"role": "user", "content": text}]


def dpo(lab: Lab) -> dict[str, Task]:
    """One sentence rather than several: pairs by a rule from the model's own answers."""
    held, others = asked(lab.small)

    def tuned(method: dict[str, Any], rate: str | None) -> Work:
        def task() -> Found:
            pairs = {
                question: {"prompt": question, "chosen": said[0], "rejected": " ".join(said)}
                for question, answer in _own(lab).items()
                if len(said := _sentences(answer)) >= 2
            }
            folder, name = lab.folder / "dpo", f"dpo-{'-'.join(method)}-{rate or 'default'}"
            test = rows(folder / f"{name}-test.jsonl", [pairs[one] for one in held if one in pairs])
            train = rows(folder / f"{name}-train.jsonl", [pairs[one] for one in others if one in pairs])
            found = lab.run(
                name, train, objective={"dpo": {"beta": "0.1"}}, method=method, keep=True,
                dataset={"evaluation": {"sources": sources(test)}},
                training={"batchSize": 8, "microBatchSize": 8, "sequenceLength": 256, **({"learningRate": rate} if rate else {})},
            )  # fmt: skip
            said = lab.answers(name, lab.folder / name / "output", {"held": [_question(one) for one in held]}, 48)
            return found | _told(said["held"])

        return task

    return {
        "dpo/as it comes": Task(3, lambda: _told([_own(lab)[one] for one in held])),
        "dpo/lora": Task(3, tuned(LORA, None)),
        "dpo/lora at 1e-4": Task(4, tuned(LORA, "1e-4")),
        "dpo/lora at 3e-5": Task(4, tuned(LORA, "3e-5")),
        "dpo/full": Task(3, tuned(FULL, None)),
        "dpo/full at 1e-5": Task(4, tuned(FULL, "1e-5")),
    }


def _told(texts: list[str]) -> Found:
    return {
        "asked": len(texts),
        "single": sum(_sentences(text) == [text] for text in texts) / len(texts),
        "words": sum(len(text.split()) for text in texts) / len(texts),
    }


def _sentences(answer: str) -> list[str]:
    """The whole sentences of an answer's first paragraph; what the end cut off is left out."""
    first = answer.split("\n")[0]
    return [one.strip() for one in re.findall(r".+?[.!?](?=\s+[A-Z]|\s*$)", first)]


def pretrain(lab: Lab) -> dict[str, Task]:
    """A domain's texts, and what is forgotten of answering and of other text."""
    modules = docstrings()
    folder = lab.folder / "pretrain"
    held, count = lab.size(40, 2), lab.size(len(modules), 6)
    test = rows(folder / "test.jsonl", ({"text": text[:6000]} for text in modules[:held]))
    domain = rows(folder / "train.jsonl", ({"text": text} for text in modules[held:count]))
    ham = [mail.text[:1500] for mail in unlike() if not mail.is_spam and len(mail.text) > 300][: lab.size(200, 4)]
    mails = rows(folder / "mails.jsonl", ({"text": text} for text in ham))

    def conversations(name: str, which: int) -> Path:
        own = _own(lab)
        template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
        return rows(folder / f"{name}.jsonl", ({"text": template.format(one, own[one])} for one in asked(lab.small)[which]))  # fmt: skip

    def tuned(method: dict[str, Any], *, replay: str | None = None, **training: Any) -> Work:
        def task() -> Found:
            name = "-".join(
                ["pretrain", *method, *([f"replay{replay}"] if replay else []), *map(str, training.values())]
            )
            train = sources(domain)
            if replay:
                rest = str(1 - float(replay))
                train = sources(domain, weight=rest) + sources(conversations(f"{name}-replay", 1), weight=replay)
            return lab.run(
                name, train, objective={"pretrain": {}}, method=method,
                dataset={"evaluation": {
                    "sources": sources(test), "general": sources(conversations(f"{name}-held", 0)), "sets": [{"name": "mails", "sources": sources(mails)}],
                }},
                training={"tokensPerStep": 4096, "sequenceLength": 512, "microBatchSize": 8, "epochs": "2", **training},
            )  # fmt: skip

        return task

    return {
        "pretrain/full": Task(3, tuned(FULL)),
        "pretrain/lora": Task(3, tuned(LORA)),
        "pretrain/full, replay": Task(3, tuned(FULL, replay="0.2")),
        "pretrain/full, l2Sp 0.1": Task(3, tuned(FULL, l2Sp="0.1")),
        "pretrain/full, l2Sp 1000": Task(3, tuned(FULL, l2Sp="1000")),
        "pretrain/lora, replay": Task(3, tuned(LORA, replay="0.2")),
        "pretrain/full at 1e-4": Task(5, tuned(FULL, learningRate="1e-4")),
        "pretrain/full at 1e-4, replay": Task(5, tuned(FULL, replay="0.2", learningRate="1e-4")),
        "pretrain/full at 1e-4, l2Sp 1000": Task(5, tuned(FULL, l2Sp="1000", learningRate="1e-4")),
    }
