"""The steps of a build: what makes each shard of pairs, of clean pairs, of vectors and of triplets.

Each `prepare_...` loads what a task's shards need and returns a function from a shard's number to its file or folder
(`nvembed.eval.shards`).
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import CrossEncoder

from nvembed.eval.data.corpus import Texts, TextShards
from nvembed.eval.files import text_id, write_json
from nvembed.eval.shards import Make
from nvembed.eval.vectors import VectorShards, write_shard
from nvembed.texts_nvembed import check_characters
from nvembed.train.data.build_settings import BuildSettings, SetPaths, rules_of
from nvembed.train.data.corpus import Corpus
from nvembed.train.data.decontaminate import Decontaminator, clean_triplet, evaluation_texts, report_row
from nvembed.train.data.kinds import KINDS, kind_of
from nvembed.train.data.mining import Miner, distinct_texts
from nvembed.train.data.prepared import TRIPLET_FEATURES, described
from nvembed.train.data.source import DatasetSource, Pairs, merge_known_positives
from nvembed.train.data.teachers import BM25, EmbeddingModel, Reranked, Teacher
from nvembed.train.data.words import normalize


SCHEMA = TRIPLET_FEATURES.arrow_schema
PAIR_SCHEMA = pa.schema([*SCHEMA, ("known_positives", pa.list_(pa.string()))])
COUNTS = b"counts"  # in the metadata of each Parquet file
EXAMPLES = 1000  # dropped texts that a report keeps of each shard


# --- Tables


def write_rows(path: Path, rows: Sequence[dict], schema: pa.Schema, counts: Counter) -> None:
    """Writes a Parquet file whose bytes depend on the rows and counts alone."""
    table = pa.Table.from_pylist(list(rows), schema=schema)
    metadata = {**(table.schema.metadata or {}), COUNTS: json.dumps(dict(sorted(counts.items()))).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")


def read_rows_of(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def counts_of(path: Path) -> Counter:
    return Counter(json.loads(pq.read_schema(path).metadata[COUNTS]))


# --- 1. Rows to pairs


def prepare_pairs(settings: BuildSettings) -> Make:
    """Makes the `pairs` folder of the n-th set."""

    def make(number: int, folder: Path) -> None:
        source = settings.datasets[number]
        kind = KINDS[kind_of(source)]
        pairs: Pairs = kind.load(source, settings.num_negatives, settings.seed)
        folder.mkdir()
        if pairs.corpus is not None:
            listed = merge_known_positives(list(pairs.pairs))
            documents = ((str(i), text) for i, text in enumerate(distinct_texts(pairs.corpus, listed)))
            TextShards.write(documents, folder / "corpus", settings.corpus_shard_rows)
            rows = listed
        else:  # read twice, one row in memory at a time
            again = kind.load(source, settings.num_negatives, settings.seed)
            rows, pairs = without_positives(again.pairs, positives_of(pairs.pairs), again.counts), again
        rows = (row | {"dataset": source.name} for row in described(rows, source, settings.instruction))
        shards = total = 0
        while shard := list(islice(rows, settings.shard_rows)):
            write_rows(folder / f"{shards:05}.parquet", shard, PAIR_SCHEMA, Counter(pairs=len(shard)))
            shards += 1
            total += len(shard)
        if not total:
            raise ValueError(f"{source.name}: split {source.split!r} of {source.path} gave no pairs; leave it out")
        counts = Counter(pairs.counts) + Counter(pairs=total)
        counts["documents"] = 0 if pairs.corpus is None else TextShards.open(folder / "corpus").rows
        summary = {"shards": shards, "mines": pairs.corpus is not None, "counts": dict(sorted((+counts).items()))}
        write_json(folder / "summary.json", summary | {"kind": kind_of(source)})

    return make


def positives_of(rows: Iterable[dict]) -> dict[int, set[int]]:
    """The hashes of every query's positives, and of the query, by the query's hash: texts as `normalize` has them."""
    positives: dict[int, set[int]] = {}
    for row in rows:
        query = text_id(normalize(row["query"]))
        positives.setdefault(query, {query}).add(text_id(normalize(row["positive"])))
    return positives


def without_positives(rows: Iterable[dict], positives: dict[int, set[int]], counts: Counter) -> Iterator[dict]:
    """The rows without given negatives that are the query or a positive of it, in whichever row, but for case and
    punctuation; these are counted."""
    for row in rows:
        own = positives[text_id(normalize(row["query"]))]
        kept = [place for place, text in enumerate(row["negatives"]) if text_id(normalize(text)) not in own]
        if len(kept) < len(row["negatives"]):
            counts["negatives that are the query or a positive of it"] += len(row["negatives"]) - len(kept)
            row = row | {"negatives": [row["negatives"][place] for place in kept]}
            if row.get("negative_scores") is not None:
                row["negative_scores"] = [row["negative_scores"][place] for place in kept]
        yield row


# --- 2. Decontamination


class _Finders:
    """The decontaminators of the sets; evaluation sets are loaded once."""

    def __init__(self, settings: BuildSettings):
        self.settings = settings
        self.made: dict[str, Decontaminator] = {}

    def find(self, source: DatasetSource, texts: Sequence[str]) -> list:
        found = [None] * len(texts)
        for rule in rules_of(self.settings, source):
            key = repr(rule)
            if key not in self.made:
                self.made[key] = Decontaminator(rule, evaluation_texts(rule))
            found = [one or other for one, other in zip(found, self.made[key].find(texts))]
        return found


def prepare_clean(settings: BuildSettings, jobs: Sequence[tuple[int, SetPaths, int]]) -> Make:
    """Makes the clean version of one shard of pairs: a folder with the pairs and the report of what was dropped."""
    finders = _Finders(settings)

    def make(number: int, folder: Path) -> None:
        index, paths, shard = jobs[number]
        source, counts, report, kept = settings.datasets[index], Counter(), [], []
        for row in read_rows_of(paths.pair_shards()[shard]):
            pair, dropped = clean_triplet(row, partial(finders.find, source))
            for part, text, why in dropped:
                counts[f"{part} close to {why.set} ({why.match})"] += 1
                report.append(report_row(part, text, why))
            if pair is not None:
                kept.append(pair)
            else:
                counts["contaminated pairs"] += 1
        folder.mkdir()
        write_rows(folder / "pairs.parquet", kept, PAIR_SCHEMA, counts)
        write_json(folder / "report.json", report[:EXAMPLES])

    return make


def prepare_clean_corpus(settings: BuildSettings, jobs: Sequence[tuple[int, SetPaths]]) -> Make:
    """Makes the clean corpus of a set: without documents that are too close to evaluation sets, but for positives."""
    finders = _Finders(settings)

    def make(number: int, folder: Path) -> None:
        index, paths = jobs[number]
        source, dropped = settings.datasets[index], Counter()
        documents = TextShards.open(paths.pairs / "corpus")

        def clean() -> Iterator[tuple[str, str]]:
            kept = 0
            texts = documents.texts()
            while block := list(islice(texts, 10_000)):
                for text, why in zip(block, finders.find(source, block)):
                    if why is None:
                        yield str(kept), text
                        kept += 1
                    else:
                        dropped[f"document close to {why.set} ({why.match})"] += 1

        shards = TextShards.write(clean(), folder, settings.corpus_shard_rows)
        if not shards.rows:
            raise ValueError(f"{source.name}: all documents of its corpus are too close to evaluation sets: {dropped}")
        write_json(folder / "dropped.json", dict(sorted(dropped.items())))

    return make


# --- 3. Embedding


def prepare_vectors(settings: BuildSettings, jobs: Sequence[tuple[SetPaths, int, str]]) -> Make:
    """Embeds one shard of a set's clean corpus with the teacher."""
    model = settings.teacher.load()
    embed = model.embed_for_search

    def make(number: int, folder: Path) -> None:
        paths, shard, prefix = jobs[number]
        rows = TextShards.open(paths.corpus).shard(shard)
        write_shard(folder, rows["id"][:], embed(rows["text"][:], prefix))

    return make


# --- 4. Mining


def prepare_triplets(settings: BuildSettings, jobs: Sequence[tuple[SetPaths, int]]) -> Make:
    """Mines and checks one shard of triplets; the teacher of one set at a time is in memory."""
    corpora: dict[str, Corpus] = {}
    teachers: dict[str, Teacher] = {}  # by prefix, of the set whose corpus is in memory
    model = None if settings.teacher.model is None else settings.teacher.load()
    name = settings.teacher.cross_encoder
    score = None if name is None else partial(CrossEncoder(name).predict, show_progress_bar=False)

    def teacher_of(paths: SetPaths, instruction: str) -> tuple[Corpus, Teacher]:
        if paths.name not in corpora:
            corpora.clear()
            teachers.clear()
            corpora[paths.name] = Corpus(Texts(TextShards.open(paths.corpus)))
        corpus = corpora[paths.name]
        prefix = "" if model is None else model.query_prefix(instruction)
        if prefix not in teachers:
            if model is None:
                teacher = BM25(corpus)
            else:
                teacher = EmbeddingModel(corpus, VectorShards(paths.vectors), model.embed_for_search, prefix)
            teachers[prefix] = teacher if score is None else Reranked(corpus, teacher, score)
        return corpus, teachers[prefix]

    def make(number: int, path: Path) -> None:
        paths, shard = jobs[number]
        rows = read_rows_of(paths.clean_shards()[shard] / "pairs.parquet")
        counts = Counter(pairs=len(rows))
        if paths.summary["mines"]:
            mined = []
            for instruction in sorted({row["instruction"] for row in rows}):
                corpus, teacher = teacher_of(paths, instruction)
                miner = Miner(teacher, corpus, settings.num_negatives, settings.mining, settings.seed)
                mined += miner.mine([row for row in rows if row["instruction"] == instruction])
                counts.update(miner.counts)
            rows = mined
        triplets = [checked(row, settings.num_negatives, f"{paths.name}, shard {shard}", counts) for row in rows]
        counts["triplets"] = len(triplets)
        counts["negatives"] = sum(len(triplet["negatives"]) for triplet in triplets)
        counts["triplets without a negative"] = sum(not triplet["negatives"] for triplet in triplets)
        write_rows(path, triplets, SCHEMA, +counts)

    return make


def checked(row: dict, num_negatives: int, name: str, counts: Counter) -> dict:
    """A triplet with the columns of `TRIPLET_FEATURES`, at most `num_negatives` negatives, none of them its own text.

    Raises:
        ValueError: a text is empty or not a string, the scores do not fit the negatives, or there is no instruction.
    """
    triplet = {column: row.get(column) for column in SCHEMA.names}
    for column in ("query", "positive", "dataset"):
        if not isinstance(triplet[column], str) or not triplet[column].strip():
            raise ValueError(f"{name}: {column} is {triplet[column]!r}; every triplet needs text there")
        check_characters(triplet[column], f"{name}: {column}")
    if not isinstance(triplet["instruction"], str) or not isinstance(triplet["symmetric"], bool):
        raise ValueError(f"{name}: instruction is {triplet['instruction']!r}, symmetric {triplet['symmetric']!r}")
    negatives, scores = triplet["negatives"] or [], triplet["negative_scores"]
    if scores is not None and len(scores) != len(negatives):
        raise ValueError(f"{name}: {len(scores)} negative_scores for {len(negatives)} negatives of {row['query']!r}")
    own = {triplet["query"], triplet["positive"]}
    places = {}  # text -> its first place
    for place, text in enumerate(negatives):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}: a negative of {row['query']!r} is {text!r}; it must be text")
        if text in own:
            counts["negatives that are the query or the positive"] += 1
        elif text in places:
            counts["repeated negatives"] += 1
        else:
            places[text] = place
    kept = list(places.values())[:num_negatives]
    triplet["negatives"] = [negatives[place] for place in kept]
    triplet["negative_scores"] = None if scores is None else [scores[place] for place in kept]
    return triplet
