"""Finds training texts that are too close to the texts of evaluation sets (paper section 4.1), and drops them.

python train/data/decontaminate.py --path my.jsonl --against STS12 my-tasks.yaml --output clean.jsonl
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from datatrove.utils.text import ngrams
from mteb.abstasks import AbsTaskRetrieval
from tqdm import tqdm

from nvembed.eval.data.beir import document_text
from nvembed.eval.data.tables import read_table
from nvembed.eval.files import text_id, write_json
from nvembed.eval.tasks.lookup import select_tasks, with_parts
from nvembed.train.data.bm25s_alone import bm25s
from nvembed.train.data.kinds import KINDS, kind_of
from nvembed.train.data.prepared import OPEN, iterate_triplets, leave_instruction_open, write_jsonl
from nvembed.train.data.source import DatasetSource, check_fields, check_keys
from nvembed.train.data.words import normal_words, normalize, split_words


MATCHES = ("exact", "normalized", "ngram", "bm25")
EXAMPLES = 10  # of what would be dropped, printed by --dry_run
ROUNDING = 1e-5  # of BM25's scores, which are fp32
TEXT_COLUMNS = ("text", "sentences", "sentence1", "sentence2", "query", "title")  # of mteb's tasks and of files


@dataclass(frozen=True)
class DecontaminationRule:
    """What is compared with what.

    Args:
        against: tasks or benchmarks of mteb, YAML files of local tasks, or tables (JSONL, CSV, Parquet) whose columns
            `text`, `sentence1`, `sentence2`, `query` hold texts. Of retrieval tasks, the queries.
        match: "exact": the same text; "normalized": the same words, whatever the case and punctuation; "ngram": `n`
            words in a row are the same; "bm25": a similarity (`BM25Similarity`) of at least `threshold`.
        n: words of an n-gram, or characters in scripts without spaces; a text with fewer is never matched by "ngram".
            None: 13.
        threshold: of "bm25", 0 to 1. None: 0.8.
        documents: compare with the documents of retrieval tasks, too.

    Raises:
        ValueError: there is nothing to compare with, or a value is unknown or out of range.
    """

    against: list[str]
    match: list[str] = field(default_factory=lambda: ["normalized", "ngram"])
    n: int | None = None
    threshold: float | None = None
    documents: bool = False

    def __post_init__(self):
        check_fields(self, "decontaminate")
        for name in ("against", "match"):
            if not getattr(self, name):
                raise ValueError(f"decontaminate: {name} is empty; it must be a list of at least one name")
        if unknown := [match for match in self.match if match not in MATCHES]:
            raise ValueError(f"decontaminate: match has {unknown[0]!r}; known are {', '.join(MATCHES)}")
        for name, match, usual in (("n", "ngram", 13), ("threshold", "bm25", 0.8)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)
            elif match not in self.match:
                raise ValueError(
                    f"decontaminate: {name} is {getattr(self, name)}, which is of the match {match}, and match is "
                    f"{', '.join(self.match)}: add {match} to it, or leave {name} out"
                )
        if self.n < 1:
            raise ValueError(f"decontaminate: n is {self.n!r}; it must be a number of words, 1 or more")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"decontaminate: threshold is {self.threshold}; it must be above 0 and up to 1, the same")


def read_rule(content: object) -> DecontaminationRule:
    """A recipe's mapping as a rule; a `ValueError` names an unknown key."""
    check_keys(content, DecontaminationRule, "decontaminate")
    if "against" not in content:
        raise ValueError(f"decontaminate: {content} does not say `against:` what")
    return DecontaminationRule(**content)


# --- Texts of evaluation sets


def evaluation_texts(rule: DecontaminationRule) -> dict[str, list[str]]:
    """The distinct texts of each evaluation set by its name, without empty ones.

    Raises:
        ValueError: a set does not exist, cannot be loaded, or holds no texts.
    """
    texts: dict[str, list[str]] = {}
    for name in rule.against:
        if Path(name).is_file() and not name.endswith((".yaml", ".yml")):
            found = {Path(name).stem: _texts_of_rows(row for _, row in read_table(Path(name)))}
        else:
            found = {
                task.metadata.name: _texts_of_task(task, rule.documents)
                for task in with_parts(select_tasks([name]))
                if not hasattr(task.metadata, "tasks")  # an aggregate's parts have the texts
            }
        for set_, its_texts in found.items():
            distinct = list(dict.fromkeys(text for text in its_texts if text.strip()))
            if not distinct:
                raise ValueError(
                    f"decontaminate: {set_} (of {name}) holds no texts in columns {', '.join(TEXT_COLUMNS)}"
                )
            texts[set_] = list(dict.fromkeys([*texts.get(set_, ()), *distinct]))  # two files may have one name
    return texts


def _texts_of_task(task, documents: bool) -> Iterator[str]:
    if not task.data_loaded:
        try:
            task.load_data()
        except Exception as error:
            raise ValueError(f"decontaminate: the data of {task.metadata.name} failed to load: {error}") from error
    for data in _evaluated_parts(task.dataset, task.eval_splits):
        if isinstance(task, AbsTaskRetrieval):
            yield from data["queries"]["text"]
            if documents:
                yield from (document_text(row) for row in data["corpus"])
        else:
            yield from _texts_of_rows(data)


def _evaluated_parts(data: Mapping, splits: Sequence[str]) -> Iterator:
    """The parts of a task's data that it is measured on: mteb keeps them by split, or by subset and split."""
    for name, part in data.items():
        if isinstance(part, Dataset) or "queries" in part:
            if name in splits:
                yield part
        else:
            yield from _evaluated_parts(part, splits)


def _texts_of_rows(rows: Iterable[dict]) -> Iterator[str]:
    for row in rows:
        for column in TEXT_COLUMNS:
            value = row.get(column)
            yield from (part for part in (value if isinstance(value, list) else [value]) if isinstance(part, str))


# --- Matching


@dataclass(frozen=True)
class Contamination:
    """Why a text is dropped: the first match found, the evaluation set, and its text or the words in common."""

    match: str
    set: str
    text: str


class Decontaminator:
    """Looks training texts up among the texts of evaluation sets.

    Args:
        texts: of each evaluation set by name, see `evaluation_texts`.
    """

    def __init__(self, rule: DecontaminationRule, texts: dict[str, Sequence[str]]):
        self.rule = rule
        self.exact = {text: set_ for set_, its in reversed(texts.items()) for text in its}
        self.normalized: dict[str, tuple[str, str]] = {}
        self.ngrams: dict[int, tuple[str, str]] = {}
        for text, set_ in self.exact.items():
            normal = normalize(text)
            self.normalized.setdefault(normal, (set_, text))
            if "ngram" in rule.match:
                for words in ngrams(normal_words(text), rule.n):
                    self.ngrams.setdefault(text_id(" ".join(words)), (set_, " ".join(words)))
        self.bm25 = BM25Similarity(list(self.exact)) if "bm25" in rule.match else None

    def find(self, texts: Sequence[str]) -> list[Contamination | None]:
        """For each text why it must be dropped, or None."""
        found = [self._find_equal(text) for text in texts]
        if self.bm25 is not None:
            open_ = [i for i, one in enumerate(found) if one is None]
            for i, (score, text) in zip(open_, self.bm25.nearest([texts[i] for i in open_])):
                if score >= self.rule.threshold - ROUNDING:
                    found[i] = Contamination("bm25", self.exact[text], text)
        return found

    def _find_equal(self, text: str) -> Contamination | None:
        if text in self.exact and {"exact", "normalized"} & set(self.rule.match):
            return Contamination("exact", self.exact[text], text)
        normal = normalize(text)
        if "normalized" in self.rule.match and normal in self.normalized:
            return Contamination("normalized", *self.normalized[normal])
        if "ngram" in self.rule.match:
            for words in ngrams(normal_words(text), self.rule.n):
                if (match := self.ngrams.get(text_id(" ".join(words)))) is not None:
                    return Contamination("ngram", *match)
        return None


class BM25Similarity:
    """BM25 as a similarity of 0 to 1: the score of two texts, as a share of the higher of their scores with themselves.

    So a long text does not resemble every short one that its words happen to cover.
    """

    def __init__(self, texts: Sequence[str]):
        self.texts = texts
        words = [self._words(text) for text in texts]
        self.numbers = {word: number for number, word in enumerate(dict.fromkeys(w for ws in words for w in ws))}
        self.index = None
        if self.numbers:
            ids = [[self.numbers[word] for word in ws] for ws in words]
            self.index = bm25s.BM25()
            self.index.index(
                bm25s.tokenization.Tokenized(ids, self.numbers), create_empty_token=False, show_progress=False
            )
            self.mean_length = np.mean([len(ws) for ws in words])
            self.own = np.array([self._own_score(ws) for ws in words])

    @staticmethod
    def _words(text: str) -> list[str]:
        return [word.lower() for word in split_words(text)]

    def _own_score(self, words: list[str]) -> float:
        """Lucene's BM25 of a text as query, each word once, with itself as a document; infinity without words."""
        norm = self.index.k1 * (1 - self.index.b + self.index.b * len(words) / self.mean_length)
        starts, score = self.index.scores["indptr"], 0.0
        for word, count in Counter(words).items():
            number = self.numbers.get(word)
            documents = 0 if number is None else int(starts[number + 1] - starts[number])
            score += math.log(1 + (len(self.texts) - documents + 0.5) / (documents + 0.5)) * count / (count + norm)
        return score or math.inf

    def nearest(self, texts: Sequence[str]) -> Iterator[tuple[float, str]]:
        """For each text the highest similarity, and the text that it is with; 0 where no word is in common."""
        for text in texts:
            words = self._words(text)
            known = list(dict.fromkeys(self.numbers[word] for word in words if word in self.numbers))
            if not known:
                yield 0.0, ""
                continue
            similarities = self.index.get_scores(known) / np.maximum(self.own, self._own_score(words))
            best = int(similarities.argmax())
            yield float(similarities[best]), self.texts[best]


# --- Triplets


def clean_triplet(triplet: dict, find) -> tuple[dict | None, list[tuple[str, str, Contamination]]]:
    """A triplet, or pair, without contaminated negatives; None if its query or positive is contaminated.

    Args:
        find: `Decontaminator.find`.

    Returns:
        The triplet, and what was dropped: (part of the triplet, text, why).
    """
    negatives = triplet.get("negatives") or []
    texts = [triplet["query"], triplet["positive"], *negatives]
    found = find(texts)
    parts = ["query", "positive", *["negative"] * len(negatives)]
    dropped = [(part, text, why) for part, text, why in zip(parts, texts, found) if why is not None]
    if found[0] is not None or found[1] is not None:
        return None, [one for one in dropped if one[0] != "negative"]
    kept = [place for place, why in enumerate(found[2:]) if why is None]
    if len(kept) < len(negatives):
        triplet = triplet | {"negatives": [negatives[place] for place in kept]}
        if triplet.get("negative_scores"):
            triplet["negative_scores"] = [triplet["negative_scores"][place] for place in kept]
    return triplet, dropped


def report_row(part: str, text: str, why: Contamination) -> dict:
    """One dropped text, as reports list it."""
    return {"part": part, "text": text, "match": why.match, "set": why.set, "with": why.text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="dataset: local file or folder, or Hub name")
    parser.add_argument("--kind", help="see nvembed.train.data.kinds.KINDS; inferred if left out")
    parser.add_argument("--split", default="train")
    parser.add_argument("--against", required=True, nargs="+", help="mteb's tasks, YAML files of tasks, or tables")
    parser.add_argument("--match", nargs="+", default=["normalized", "ngram"], help=", ".join(MATCHES))
    parser.add_argument("--n", type=int, help="of ngram: words of an n-gram (13)")
    parser.add_argument("--threshold", type=float, help="of bm25: share of a text's score with itself (0.8)")
    parser.add_argument("--documents", action="store_true", help="compare with documents of retrieval tasks, too")
    parser.add_argument("--num_negatives", type=int, default=7)
    parser.add_argument("--output", help="JSONL file of clean triplets to write; with a report beside it")
    parser.add_argument("--dry_run", action="store_true", help="print what would be dropped, write nothing")
    args = parser.parse_args()
    if args.dry_run == (args.output is not None):
        parser.error("give either --output or --dry_run")
    try:
        run(args)
    except (ValueError, FileExistsError) as error:
        sys.exit(str(error) if str(error).startswith("decontaminate: ") else f"decontaminate: {error}")


def read_triplets(source: DatasetSource, num_negatives: int) -> Iterator[dict]:
    """The triplets of a source, without an instruction if it gives none; rows without negatives are not mined."""
    if kind_of(source) == "triplets":
        yield from KINDS["triplets"].load(source, num_negatives, 0).pairs
        return
    yield from map(leave_instruction_open, iterate_triplets(source, num_negatives, 0, OPEN))


def run(args: argparse.Namespace) -> None:
    """Writes the clean triplets of a source and `<output>.report.json`, or prints the first that would be dropped."""
    rule = DecontaminationRule(args.against, args.match, args.n, args.threshold, args.documents)
    decontaminator = Decontaminator(rule, evaluation_texts(rule))
    source = DatasetSource(args.path, args.kind, args.split)
    counts, report = Counter(), []

    def clean() -> Iterator[dict]:
        for triplet in tqdm(read_triplets(source, args.num_negatives), desc="Comparing", unit="triplet"):
            counts["triplets"] += 1
            kept, dropped = clean_triplet(triplet, decontaminator.find)
            for part, text, why in dropped:
                counts[f"{part}, {why.match}, {why.set}"] += 1
                report.append(report_row(part, text, why))
            if kept is None:
                counts["triplets dropped"] += 1
            else:
                yield kept

    if args.dry_run:
        for _ in clean():
            pass
        for row in report[:EXAMPLES]:
            print(json.dumps(row, ensure_ascii=False), file=sys.stderr)
    else:
        write_jsonl(Path(args.output), clean())
        write_json(Path(args.output).with_suffix(".report.json"), {"counts": counts, "dropped": report})
    print(json.dumps(counts, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
