"""Texts changed at random for training, in ways that leave what is told of them as it is: dataset.augmentation of texts.

What is drawn for a text is a function of (seed, step, row) and of nothing else, as for images (see pixels). A changed text is tokenised
anew, since the tokens of a word depend on what stands before it. Words are what stands between white space. Called by prepare and objectives.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from finetune_crds.resolved import ResolvedAugmentation

from ..errors import DataError
from .encoding.classes import cut_tokens

_DRAWN: Final = 5
"""Of the seed's streams the one for texts (see order, train and pixels)."""
_CORE: Final = re.compile(r"\w(?:.*\w)?", re.DOTALL)
"""A word without the punctuation around it."""

Synonyms = Mapping[str, Sequence[str]]
"""By folded word what may stand in its place."""


def read_synonyms(lines: Iterable[str], file: str) -> dict[str, list[str]]:
    """Synonyms in the format of Solr: `film, movie` may stand for each other, `film => movie, picture` only from left to right.

    Args:
        lines: of the file; empty ones and those that begin with # are passed over.
        file: what messages call it.

    Raises:
        DataError: with the line's number, or there are none.
    """
    found: dict[str, dict[str, None]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        left, arrow, right = line.partition("=>")
        words, others = _listed(left), _listed(right if arrow else left)
        pairs = [(word, other) for word in words for other in others if word.casefold() != other.casefold()]
        if not pairs:
            raise DataError(
                f"{file} row {number}: it says no other word for one; write words that may stand for each other with commas between them, or word => word, word"
            )
        for word, other in pairs:
            found.setdefault(word.casefold(), {})[other] = None
    if not found:
        raise DataError(f"{file}: it holds no synonyms; write film, movie or film => movie, one line for each")
    return {word: list(others) for word, others in found.items()}


def merged(parts: Iterable[Synonyms]) -> dict[str, list[str]]:
    """Several files as one."""
    found: dict[str, dict[str, None]] = {}
    for part in parts:
        for word, others in part.items():
            found.setdefault(word, {}).update(dict.fromkeys(others))
    return {word: list(others) for word, others in found.items()}


class Wording:
    """What is done to training texts, with the tokenizer that reads them afterwards."""

    def __init__(
        self, tokenizer: Any, limit: int, seed: int, augmentation: ResolvedAugmentation, synonyms: Synonyms
    ) -> None:
        """Args: tokenizer: the model's; limit: tokens of the longest row; seed, augmentation: the job's; synonyms: what its list says."""
        self._tokenizer, self._limit, self._seed = tokenizer, limit, seed
        self._dropout = float(augmentation.word_dropout or 0)
        self._swap = float(augmentation.word_swap or 0)
        self._replace = float(augmentation.synonyms.probability) if augmentation.synonyms else 0.0
        self._synonyms = synonyms

    def tokens(self, texts: Sequence[str], step: int, rows: Sequence[int]) -> list[list[int]]:
        """Tokens of these rows' texts as a step has them."""
        changed = [self.changed(text, self.draw(step, row)) for text, row in zip(texts, rows, strict=True)]
        return [cut_tokens(self._tokenizer, each, self._limit) for each in self._tokenizer(changed)["input_ids"]]

    def draw(self, step: int, row: int) -> np.random.Generator:
        """What is drawn for a row in a step."""
        return np.random.default_rng([self._seed, _DRAWN, step, row])

    def changed(self, text: str, draw: np.random.Generator) -> str:
        """A text with synonyms put in, words swapped and words left out, in this order."""
        words = re.findall(r"\S+", text)
        gaps = re.split(r"\S+", text)
        if self._replace:
            words = replaced(words, self._synonyms, self._replace, draw)
        if self._swap:
            words = swapped(words, self._swap, draw)
        kept = kept_words(len(words), self._dropout, draw) if self._dropout else range(len(words))
        return gaps[0] + "".join(words[i] + gaps[i + 1] for i in kept)


def check_words(texts: Iterable[str], augmentation: ResolvedAugmentation, synonyms: Synonyms) -> None:
    """Makes sure that there is something to change: reads only as many texts as it takes to find it.

    Raises:
        DataError: no text has two words, or one of the list.
    """
    several = not (augmentation.word_dropout or augmentation.word_swap)
    known = augmentation.synonyms is None
    for text in texts:
        words = text.split()
        several = several or len(words) > 1
        known = known or any(_core(word) in synonyms for word in words)
        if several and known:
            return
    if not several:
        raise DataError(
            "dataset.augmentation: no training text has two words with white space between them, so wordDropout and wordSwap would change nothing; remove them"
        )
    if not known:
        raise DataError(
            f"dataset.augmentation.synonyms: none of the {len(synonyms)} words of the list is in a training text; correct the list, or remove it"
        )


def replaced(words: Sequence[str], synonyms: Synonyms, probability: float, draw: np.random.Generator) -> list[str]:
    """Each word of the list, with a probability, by one of its synonyms (Wei and Zou 2019); punctuation around it and its capitals stay."""
    found = []
    for word in words:
        others = synonyms.get(_core(word))
        if others and draw.random() < probability:
            core = _CORE.search(word)
            assert core, "what the list knows has one"
            other = others[int(draw.integers(len(others)))]
            word = word[: core.start()] + _in_case_of(core.group(), other) + word[core.end() :]
        found.append(word)
    return found


def swapped(words: Sequence[str], probability: float, draw: np.random.Generator) -> list[str]:
    """Each word, with a probability, changes places with the next; one that has moved stays (a local permutation, Lample et al. 2018)."""
    found = list(words)
    i = 0
    while i < len(found) - 1:
        if draw.random() < probability:
            found[i], found[i + 1] = found[i + 1], found[i]
            i += 1
        i += 1
    return found


def kept_words(count: int, probability: float, draw: np.random.Generator) -> list[int]:
    """Of so many words those that stay when each is left out with a probability; one always does (Wei and Zou 2019)."""
    if not count:
        return []
    kept = np.flatnonzero(draw.random(count) >= probability).tolist()
    return kept or [int(draw.integers(count))]


def _listed(part: str) -> list[str]:
    return [word for each in part.split(",") if (word := " ".join(each.split()))]


def _core(word: str) -> str:
    found = _CORE.search(word)
    return found.group().casefold() if found else ""


def _in_case_of(word: str, other: str) -> str:
    if len(word) > 1 and word.isupper():
        return other.upper()
    return other[0].upper() + other[1:] if word[0].isupper() else other
