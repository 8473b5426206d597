"""Who ranks a corpus for mining: BM25 here, an embedding model later."""

import unicodedata
from collections.abc import Iterator
from typing import Protocol

import bm25s
import numpy as np
import regex
from bm25s.tokenization import Tokenizer
from transformers.utils.logging import get_logger


logger = get_logger(__name__)


class Teacher(Protocol):
    """What ranks a corpus for mining."""

    def scores(self, queries: list[str], corpus: list[str]) -> Iterator[np.ndarray]:
        """For each query, the scores of all documents, `[len(corpus)]`; higher is closer."""


class BM25:
    """BM25 over the words of `split_words`, lower-case, without English stop words."""

    def scores(self, queries: list[str], corpus: list[str]) -> Iterator[np.ndarray]:
        """As `Teacher.scores`; warns at the end of queries without a word of the corpus, which score 0 everywhere."""
        tokens = _tokenize(corpus)
        retriever, unmatched = None, 0
        if any(tokens):  # else there is no word to index: bm25s would stop at its empty vocabulary
            retriever = bm25s.BM25()
            retriever.index(tokens, show_progress=False)
        for words in _tokenize(queries):
            known = [word for word in words if word in retriever.vocab_dict] if retriever is not None else []
            unmatched += not known
            yield retriever.get_scores(known) if known else np.zeros(len(corpus), dtype=np.float32)
        if unmatched:
            logger.warning(
                f"{unmatched} of {len(queries)} queries share no word with the corpus: BM25 cannot rank it for them, "
                "and their negatives are drawn at random"
            )


# Scripts that are written without spaces between words.
UNSPACED = "".join(
    rf"\p{{Script={name}}}" for name in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")
)
# A run of such a script with its marks, or a word of letters, digits and marks of others.
RUNS = regex.compile(rf"(?V1)(?P<unspaced>[[{UNSPACED}ー]&&[\w\p{{M}}]]+)|[[\w\p{{M}}]--[{UNSPACED}]]+")
CHARACTERS = regex.compile(r"\X")  # a letter with its marks


def split_words(text: str) -> list[str]:
    """The words of a text, one-letter words included; of a script without spaces, its characters and pairs of them.

    Overlapping pairs are how search engines index Chinese, Japanese and Thai without a dictionary; the characters
    beside them match words of one character. Full and half width are one (NFKC).
    """
    words = []
    for run in RUNS.finditer(unicodedata.normalize("NFKC", text)):
        if run["unspaced"] is None:
            words.append(run[0])
            continue
        characters = CHARACTERS.findall(run[0])
        words += characters
        words += map("".join, zip(characters, characters[1:]))
    return words


def _tokenize(texts: list[str]) -> list[list[str]]:
    tokenizer = Tokenizer(lower=True, splitter=split_words, stopwords="en")
    rows = tokenizer.tokenize(texts, return_as="string", show_progress=False)
    return [[word for word in row if word] for row in rows]  # bm25s gives an empty text one empty word
