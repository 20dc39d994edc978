"""Rows for the question whether prompting would do as well as tuning: held-out rows and the user's prompts behind examples of the training rows.

Called by setup, once a node. Which examples is a function of the seed. They are turns of one conversation where the model has a chat
template, else texts with an empty line between them; in both cases a held-out row has the same answer, in the same tokens, as without them.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from finetune_crds import support
from finetune_crds.resolved import ResolvedFineTune

from ..errors import DataError, UserError
from ..storage.sources import fetched
from .encoding.row import EncodedRow
from .formats import Chat, Example, Instruction, Pair
from .holdout import Division
from .prepare import Dataset, row_format
from .prepared import INDEX, Index, RowSet, RowWriter
from .rows import read_rows
from .templates import ChatTemplate, rendered

PLAIN: Final = 0
"""Source number of a held-out row as it is."""
PROMPTED: Final = 1
"""Of the same behind examples."""
QUESTION: Final = 2
"""Of one of evaluation.prompts behind examples, without an answer; without tokens where it leaves no room for one. The row's number says how many."""
_POOL: Final = 16
"""Rows looked at for each example, since some are too long or no question with an answer."""
_REREAD: Final = 1024**3
"""Bytes of files from which examples come: they are fetched once more."""
_TOKEN: Final = 4
"""Bytes of a file that a token stands for, about."""


def prepare(
    spec: ResolvedFineTune, files: Dataset, rows: RowSet, division: Division, tokenizer: Any, folder: Path
) -> Path | None:
    """Writes these rows below `folder`, or finds them there.

    Returns:
        Where they are; None where there are none, since nobody asks or no training row is a question with an answer.
    """
    asked = spec.evaluation.few_shot
    assert asked
    described = [rows.index.digest, spec.dataset.to_wire(), spec.evaluation.to_wire(), spec.training.seed]
    target = folder / hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    if (target / INDEX).exists():
        return target
    draw = np.random.default_rng([spec.training.seed, 8])
    pool = draw.permutation(
        _near(spec, files, rows, _fit(spec, rows, np.setdiff1d(division.train, division.selection.leaked)))
    )
    held_out = draw.permutation(_near(spec, files, rows, _fit(spec, rows, division.held_out)))[: asked.rows]
    pool = pool[: _POOL * asked.examples]
    found = _examples(spec, files, rows, np.concatenate([pool, held_out]))
    shown = _shown(spec, rows, pool, found, asked.examples)
    if not shown:
        return None
    examples = [found[row] for row in held_out.tolist() if _suits(found[row])]
    try:
        made = _pairs(spec, tokenizer, shown) if spec.task in support.PAIRS else _language(spec, tokenizer, shown, examples)  # fmt: skip
    except (UserError, DataError):  # what a template does not take; no reason not to train
        return None
    temporary = target.with_suffix(".part")
    shutil.rmtree(temporary, ignore_errors=True)
    writer = RowWriter(temporary)
    for source, number, encoded in made:
        writer.add(encoded, sources=source, files=0, numbers=number, content=0, groups=0, slices=0)
    writer.finish(Index(digest=rows.index.digest, files=[], classes=[]))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return target


_Made = list[tuple[int, int, EncodedRow]]
"""Source, how many examples, row."""


def _fit(spec: ResolvedFineTune, rows: RowSet, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Whole ones that leave half of a sequence's room, one of each content."""
    assert spec.training.sequence_length
    short = ids[(rows.lengths[ids] <= spec.training.sequence_length // 2) & ~rows.truncated[ids]]
    return short[np.sort(np.unique(rows.content[short], return_index=True)[1])]


def _near(spec: ResolvedFineTune, files: Dataset, rows: RowSet, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those in files of so many bytes as are read again; the first file counts whatever its size, with its beginning if it is read as it arrives."""
    listed = files.listed
    numbers = np.random.default_rng([spec.training.seed, 10]).permutation(np.unique(rows.files[ids]))
    before = np.cumsum([0, *(listed[number].size or 0 for number in numbers)])[:-1]
    numbers = numbers[before < _REREAD]
    near = ids[np.isin(rows.files[ids], numbers)]
    for number in (number for number in numbers if listed[number].arrive):
        own = np.flatnonzero(rows.files == number)
        near = near[~np.isin(near, own[np.cumsum(rows.lengths[own]) * _TOKEN > _REREAD])]
    return near


def _examples(spec: ResolvedFineTune, files: Dataset, rows: RowSet, ids: NDArray[np.int64]) -> dict[int, Example]:
    """Rows by their ids, read again from the files, of which the prepared set holds tokens only."""
    at = {(int(rows.files[row]), int(rows.numbers[row])): int(row) for row in ids}
    last = {file: max(number for other, number in at if other == file) for file, _ in at}
    found: dict[int, Example] = {}
    listed = files.listed
    with closing(fetched(listed[i] for i in sorted(last))) as there:
        for i, (file, content) in zip(sorted(last), there, strict=True):
            shape = None
            for number, row in read_rows(content, file.uri):
                shape = shape or row_format(spec, row, file.uri, content)
                if (i, number) in at:
                    found[at[i, number]] = shape.example(number, row)
                if number >= last[i]:
                    break
    return found


def _shown(
    spec: ResolvedFineTune, rows: RowSet, pool: NDArray[np.int64], found: dict[int, Example], count: int
) -> list[Example]:
    """The first of them that fit into half of a sequence together."""
    assert spec.training.sequence_length
    room = spec.training.sequence_length // 2
    shown: list[Example] = []
    for row in pool.tolist():
        length = int(rows.lengths[row])
        if len(shown) < count and length <= room and _suits(found[row]):
            shown.append(found[row])
            room -= length
    return shown


def _suits(example: Example) -> bool:
    """Whether it is a question with an answer that can be shown."""
    if isinstance(example, Instruction | Pair):
        return True
    if not isinstance(example, Chat) or example.tools:
        return False
    roles = [message["role"] for message in _turns(example)]
    texts = all(isinstance(message.get("content"), str) for message in example.messages)
    return texts and roles == ["user", "assistant"] * (len(roles) // 2) and bool(roles)


def _chat(example: Example) -> Chat:
    assert isinstance(example, Chat | Instruction)
    return example.chat if isinstance(example, Instruction) else example


def _turns(chat: Chat) -> list[dict[str, Any]]:
    return [message for message in chat.messages if message["role"] != "system"]


def _system(chat: Chat) -> list[dict[str, Any]]:
    return [message for message in chat.messages if message["role"] == "system"]


def _language(spec: ResolvedFineTune, tokenizer: Any, shown: list[Example], examples: list[Example]) -> _Made:
    limit = spec.training.sequence_length or 0
    prompts = spec.evaluation.prompts
    way = _Turns(tokenizer) if getattr(tokenizer, "chat_template", None) else _Texts(tokenizer)
    plain, prompted = way.rows(examples, []), way.rows(examples, shown)
    made: _Made = []
    for one, other in zip(plain, prompted, strict=True):
        answers = [[token for token, it in zip(row.tokens, row.learned, strict=True) if it] for row in (one, other)]
        if (
            answers[0] == answers[1] and answers[0] and len(other.tokens) <= limit
        ):  # a template may write history otherwise
            made += [(PLAIN, 0, one), (PROMPTED, len(shown), other)]
    return made + _questions(prompts, shown, way.question, limit)


def _pairs(spec: ResolvedFineTune, tokenizer: Any, shown: list[Example]) -> _Made:
    prefix = spec.dataset.prefix or ""

    def question(prompt: str, behind: Sequence[Example]) -> list[int]:
        pairs = [one for one in behind if isinstance(one, Pair)]
        text = "".join(f"{prefix}{pair.source}\n{pair.target}\n\n" for pair in pairs)
        tokens: list[int] = tokenizer(text + prefix + prompt)["input_ids"]
        return tokens

    prompts = spec.evaluation.prompts
    return _questions(prompts, shown, question, spec.training.sequence_length or 0)


def _questions(prompts: Sequence[str], shown: list[Example], question: Any, limit: int) -> _Made:
    """Each prompt behind as many examples as leave it room."""
    made: _Made = []
    for prompt in prompts:
        tries = ((count, question(prompt, shown[:count])) for count in range(len(shown), 0, -1))
        count, tokens = next(((count, tokens) for count, tokens in tries if len(tokens) <= limit), (0, []))
        made.append((QUESTION, count, EncodedRow(tokens, targets=0)))
    return made


class _Turns:
    """Examples as turns of the same conversation. A row has its own system message; a prompt has that of all examples, if they have one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._template = tokenizer, ChatTemplate(tokenizer)

    def rows(self, examples: Sequence[Example], shown: Sequence[Example]) -> list[EncodedRow]:
        before = [turn for one in shown for turn in _turns(_chat(one))]
        chats = []
        for chat in map(_chat, examples):
            given = [*_system(chat), *before]
            chats.append(Chat([*given, *_turns(chat)], chat.tools, given=len(given)))
        if not chats:
            return []
        encoded = self._template.encode(chats, ["a row of evaluation.fewShot"] * len(chats))
        return [EncodedRow(one.tokens, one.learned, targets=sum(one.learned[1:])) for one in encoded]

    def question(self, prompt: str, shown: Sequence[Example]) -> list[int]:
        chats = [_chat(one) for one in shown]
        system = _system(chats[0]) if all(_system(chat) == _system(chats[0]) for chat in chats) else []
        messages = [*system, *(turn for chat in chats for turn in _turns(chat)), {"role": "user", "content": prompt}]
        text = rendered(self._tokenizer, messages, ask=True)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


class _Texts:
    """Examples as texts before it. The token that ends an answer is left out on both sides, since no text shows when to write it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def rows(self, examples: Sequence[Example], shown: Sequence[Example]) -> list[EncodedRow]:
        found = []
        for one in examples:
            assert isinstance(one, Instruction)
            head = self._tokens(self._before(shown) + _asked(one.system, one.prompt))
            tail = list(self._tokenizer(one.completion, add_special_tokens=False)["input_ids"])
            learned = [False] * len(head) + [True] * len(tail)
            found.append(EncodedRow([*head, *tail], learned, targets=len(tail)))
        return found

    def question(self, prompt: str, shown: Sequence[Example]) -> list[int]:
        return self._tokens(self._before(shown) + _asked(None, prompt))

    def _before(self, shown: Sequence[Example]) -> str:
        rows = (one for one in shown if isinstance(one, Instruction))
        return "".join(f"{_asked(one.system, one.prompt)}{one.completion}\n\n" for one in rows)

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = list(self._tokenizer(text)["input_ids"])
        return tokens[:-1] if tokens and tokens[-1] == self._tokenizer.eos_token_id else tokens


def _asked(system: str | None, prompt: str) -> str:
    return "\n\n".join(filter(None, (system, prompt))) + "\n\n"
