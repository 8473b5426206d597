"""Triplets with or without negatives, in the layouts that people have them in, read as they are.

| layout | query | positives | negatives | beside them |
|---|---|---|---|---|
| ours | `query` | `positive` | `negatives`, a list | `positive_score`, `negative_scores`, `class` |
| sentence-transformers | `anchor` or `query` | `positive` | `negative`, or `negative_1`, `negative_2`, ... | |
| FlagEmbedding | `query` | `pos`, a list | `neg`, a list | `pos_scores`, `neg_scores`, `prompt` (the instruction) |
| tevatron | `query` | `positive_passages` | `negative_passages`, lists of `title` and `text` | |
"""

import math
import re
from collections import Counter
from collections.abc import Mapping

from transformers.utils.logging import get_logger

from nvembed.eval.data import tables
from nvembed.eval.data.beir import document_text
from nvembed.train.data.source import DatasetSource, Pairs, read_rows, sample, text_of


logger = get_logger(__name__)

QUERY = ("query", "anchor")
POSITIVE = ("positive", "pos", "positive_passages")
NEGATIVES = ("negatives", "negative", "neg", "negative_passages")
NUMBERED_NEGATIVE = re.compile(r"negative_\d+")
LISTS = ("pos", "neg", "negatives", "positive_passages", "negative_passages")
SCORES = {"positive_score", "negative_scores", "pos_scores", "neg_scores"}
KNOWN = {*QUERY, *POSITIVE, *NEGATIVES, *SCORES, "instruction", "prompt", "symmetric", "dataset", "class"}


def load(source: DatasetSource, num_negatives: int, seed: int) -> Pairs:
    """Triplets, read one at a time, one for each positive; rows may have fewer negatives than others.

    Where no row has negatives, the positives are the corpus to mine.

    Raises:
        ValueError: a row lacks a field or has it twice, has an empty text, or another number of scores than texts;
            file and line are named.
    """
    rows, count, have_negatives = survey(source)
    chosen = None if source.samples is None else set(sample(list(range(count)), source.samples, seed))
    triplets = (triplet for name, row in read_rows(source) for triplet in triplets_of(name, row))
    triplets = (triplet for position, triplet in enumerate(triplets) if chosen is None or position in chosen)
    counts = Counter(rows=rows)
    if count > rows:
        counts["further positives"] = count - rows
    if chosen is not None and len(chosen) < count:
        counts["not sampled"] = count - len(chosen)
    if have_negatives:
        return Pairs(triplets, counts=counts)
    pairs = list(triplets)
    return Pairs(pairs, [pair["positive"] for pair in pairs], counts)


def survey(source: DatasetSource) -> tuple[int, int, bool]:
    """How many rows there are, how many triplets they make, and whether any has negatives.

    Warns of columns that hold unread texts.
    """
    rows, count, have_negatives, unread = 0, 0, False, set()
    for _, row in read_rows(source):
        rows += 1
        positives = next((row[column] for column in POSITIVE if row.get(column) is not None), None)
        count += len(positives) if isinstance(positives, list) else 1
        have_negatives = have_negatives or any(row[column] for column in _negative_columns(row))
        unread |= {column for column in row.keys() - KNOWN - unread if _looks_like_text(column, row[column])}
    if unread:
        names = ", ".join(f'"{column}"' for column in sorted(unread))
        logger.warning(
            f"{source.path}: {names} hold texts that are not read; columns that are: {', '.join(QUERY)}; "
            f"{', '.join(POSITIVE)}; {', '.join(NEGATIVES)}, negative_<n>"
        )
    return rows, count, have_negatives


def triplets_of(name: str, row: Mapping) -> list[dict]:
    """The triplets of one row, one for each of its positives.

    Raises:
        ValueError: as `load`.
    """
    query = text_of(row, _column(row, QUERY, name), name)
    column = _column(row, POSITIVE, name)
    positives = _texts(row, column, name)
    if not positives:
        raise ValueError(f'{name}: "{column}" is an empty list; every triplet needs a positive')
    negatives = [text for negative in _negative_columns(row) for text in _texts(row, negative, name)]
    positive_scores = row.get("pos_scores")
    negative_scores = row.get("neg_scores") if row.get("neg_scores") is not None else row.get("negative_scores")
    if row.get("positive_score") is not None:
        positive_scores = [row["positive_score"]]
    described = {}
    meanings = {"prompt": "instruction", "instruction": "instruction", "dataset": "dataset", "class": "class"}
    for column, meaning in meanings.items():
        if row.get(column) is not None:
            described[meaning] = tables.text_of(row, column, name)
    if row.get("symmetric") is not None:
        described["symmetric"] = row["symmetric"]
        if not isinstance(row["symmetric"], bool):
            raise ValueError(f'{name}: "symmetric" is {row["symmetric"]!r}, not true or false')
    if negative_scores is not None:
        described["negative_scores"] = _scores(negative_scores, negatives, "negatives", name)
    if positive_scores is not None:
        positive_scores = _scores(positive_scores, positives, "positives", name)
    return [
        {**described, "query": query, "positive": positive, "negatives": negatives}
        | ({} if positive_scores is None else {"positive_score": positive_scores[position]})
        for position, positive in enumerate(positives)
    ]


def _column(row: Mapping, names: tuple[str, ...], name: str) -> str:
    found = [column for column in names if row.get(column) is not None]
    if len(found) > 1:
        raise ValueError(f'{name}: "{found[0]}" and "{found[1]}" are both there; keep the one that is meant')
    if not found:
        raise ValueError(f'{name}: "{names[0]}" is missing; found {sorted(row)}')
    return found[0]


def _negative_columns(row: Mapping) -> list[str]:
    numbered = (column for column in row if NUMBERED_NEGATIVE.fullmatch(column))
    columns = [*NEGATIVES, *sorted(numbered, key=lambda column: int(column.rsplit("_", 1)[1]))]
    # Tables give the rows that lack one an empty cell.
    return [column for column in columns if row.get(column) not in (None, "", [])]


def _texts(row: Mapping, column: str, name: str) -> list[str]:
    """The texts of a column that holds one, or a list of them, or of passages with title and text."""
    value = row[column]
    if not isinstance(value, list):
        if column in LISTS:
            raise ValueError(f'{name}: "{column}" is {value!r}, not a list of strings')
        return [text_of(row, column, name)]
    texts = []
    for position, item in enumerate(value):
        cell = f"{column}[{position}]"
        if isinstance(item, Mapping):
            for part in ("text", "title"):
                if not isinstance(item.get(part) or "", str) or (part == "text" and "text" not in item):
                    raise ValueError(f'{name}: "{cell}" is {item!r}; a passage has a "text", and maybe a "title"')
            item = document_text({"title": item.get("title"), "text": item["text"] or ""})
        texts.append(text_of({cell: item}, cell, name))
    return texts


def _scores(scores, texts: list[str], what: str, name: str) -> list[float]:
    numbers = isinstance(scores, list) and all(
        isinstance(score, (int, float)) and not isinstance(score, bool) and math.isfinite(score) for score in scores
    )
    if not numbers or len(scores) != len(texts):
        raise ValueError(f"{name}: the scores of the {what} are {scores!r}; {len(texts)} numbers are needed")
    return [float(score) for score in scores]


def _looks_like_text(column: str, value) -> bool:
    if NUMBERED_NEGATIVE.fullmatch(column):
        return False
    if value and isinstance(value, (str, list)) and any(part in column.lower() for part in ("neg", "hard", "passage")):
        return True  # even of single words
    if isinstance(value, str):
        return not value.isascii() or any(character.isspace() for character in value.strip())
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, list) and any(_looks_like_text("", item) for item in value)
