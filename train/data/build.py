"""The steps of `build_data.py`: rows -> pairs and corpus -> decontaminated -> embedded -> mined -> triplets in Parquet.

    output_dir/
      manifest.json               what was built from what: settings, counts of each step, SHA-256 of every file
      <set>/train-00000-of-00003.parquet     triplets, in the Hub's layout
      work/<set>/pairs/           pairs in shards, and the corpus to mine, by position
      work/<set>/clean/           the same without what is too close to evaluation sets
      work/<set>/corpus/          texts of the clean corpus, in shards
      work/<set>/vectors/         their embeddings, if the teacher is a model

Each step writes shards that are there whole or not at all. Their content depends on the settings and the data alone,
not on the number of tasks nor on interruptions.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import CrossEncoder

from nvembed.eval.data.corpus import Texts, TextShards
from nvembed.eval.files import sha256, write_json
from nvembed.eval.models import LoadedModel, digest_model, load_model
from nvembed.eval.shards import ExecutorArguments, Make, make_shards
from nvembed.eval.vectors import (
    MANIFEST,
    MadeFrom,
    VectorShards,
    forget_if_incomplete,
    shard_path,
    write_manifest,
    write_shard,
)
from nvembed.texts_nvembed import check_characters
from nvembed.train.collator import text_id
from nvembed.train.data.corpus import Corpus
from nvembed.train.data.decontaminate import (
    DecontaminationRule,
    Decontaminator,
    clean_triplet,
    evaluation_texts,
    read_rule,
)
from nvembed.train.data.kinds import KINDS, kind_of
from nvembed.train.data.mining import Miner, MiningRules, distinct_texts, merge_known_positives
from nvembed.train.data.prepared import TRIPLET_FEATURES, first_difference, provenance
from nvembed.train.data.source import DatasetSource, Pairs, check_fields
from nvembed.train.data.teachers import BM25, EmbeddingModel, Reranked, Teacher
from nvembed.train.data.words import normalize


SCHEMA = TRIPLET_FEATURES.arrow_schema
PAIR_SCHEMA = pa.schema([*SCHEMA, ("known_positives", pa.list_(pa.string()))])
COUNTS = b"counts"  # in the metadata of each Parquet file
EXAMPLES = 1000  # dropped texts that a report keeps of each shard


@dataclass(frozen=True)
class TeacherSettings:
    """Who ranks the corpora.

    Args:
        model: a folder or Hub name of any embedding model; None: BM25.
        revision, max_length, batch_tokens, dtype, trust_remote_code: as in `load_model`.
        instruct: give a sentence-transformers model the sets' instructions, for models trained with them.
        cross_encoder: a sentence-transformers cross-encoder that reranks what the first finds.
    """

    model: str | None = None
    revision: str | None = None
    max_length: int = 512
    batch_tokens: int | None = None
    dtype: str = "auto"
    instruct: bool = True
    trust_remote_code: bool = False
    cross_encoder: str | None = None

    def __post_init__(self):
        check_fields(self, "teacher")

    def load(self) -> LoadedModel:
        return load_model(
            self.model, self.revision, self.max_length, self.batch_tokens, self.dtype, self.instruct,
            self.trust_remote_code,
        )  # fmt: skip


@dataclass
class BuildSettings:
    """A recipe of `build_data.py`.

    Args:
        datasets: the sets, as in a training recipe.
        num_negatives: hard negatives of a triplet (paper: 7).
        seed: of sampling and drawing.
        instruction: for sets that name none.
        teacher, mining: who ranks, and which ranks become negatives.
        decontaminate: rule for all sets, beside a set's own; None: only sets with one of their own are compared.
        shard_rows: pairs of a shard.
        corpus_shard_rows: documents of a shard.
    """

    datasets: list[DatasetSource]
    num_negatives: int = 7
    seed: int = 42
    instruction: str | None = None
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    mining: MiningRules = field(default_factory=MiningRules)
    decontaminate: DecontaminationRule | None = None
    shard_rows: int = 10_000
    corpus_shard_rows: int = 50_000


@dataclass(frozen=True)
class SetPaths:
    """Where a set's files are."""

    output: Path
    name: str

    @property
    def work(self) -> Path:
        return self.output / "work" / self.name

    @property
    def pairs(self) -> Path:
        return self.work / "pairs"

    @property
    def clean(self) -> Path:
        return self.work / "clean"

    @property
    def corpus(self) -> Path:
        return self.work / "corpus"

    @property
    def vectors(self) -> Path:
        return self.work / "vectors"

    @cached_property
    def summary(self) -> dict:
        """Of the pairs step: its number of shards, whether there is a corpus, and its counts."""
        return json.loads((self.pairs / "summary.json").read_text(encoding="utf-8"))

    def pair_shards(self) -> list[Path]:
        return [self.pairs / f"{number:05}.parquet" for number in range(self.summary["shards"])]

    def clean_shards(self) -> list[Path]:
        return [self.clean / path.name for path in self.pair_shards()]

    def triplet_shards(self) -> list[Path]:
        count = self.summary["shards"]
        return [self.output / self.name / f"train-{number:05}-of-{count:05}.parquet" for number in range(count)]


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


def prepare_pairs(settings: BuildSettings, output: Path) -> Make:
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
            rows = iter(listed)
        else:  # read twice, one row in memory at a time
            again = kind.load(source, settings.num_negatives, settings.seed)
            rows, pairs = without_positives(again.pairs, positives_of(pairs.pairs), again.counts), again
        usual = {"dataset": source.name, "instruction": settings.instruction, "symmetric": kind.symmetric}
        asked = {"instruction": source.instruction, "symmetric": source.symmetric}
        asked = {column: value for column, value in asked.items() if value is not None}
        shards = total = 0
        while shard := list(islice(rows, settings.shard_rows)):
            shard = [{**usual, **row, **asked, "dataset": source.name} for row in shard]
            if any(row["instruction"] is None for row in shard):
                raise ValueError(
                    f"{source.name} has no instruction, which every query carries (paper section 3.1): set "
                    '`instruction:` in its entry, or for all; "" is for none'
                )
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


def rules_of(settings: BuildSettings, source: DatasetSource) -> list[DecontaminationRule]:
    """The rules that a set's texts are compared by: the recipe's and its own."""
    own = [] if source.decontaminate is None else [read_rule(source.decontaminate)]
    return [*([] if settings.decontaminate is None else [settings.decontaminate]), *own]


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
                report.append({"part": part, "text": text, **asdict_of(why)})
            if pair is not None:
                kept.append(pair)
            else:
                counts["contaminated pairs"] += 1
        folder.mkdir()
        write_rows(folder / "pairs.parquet", kept, PAIR_SCHEMA, counts)
        write_json(folder / "report.json", report[:EXAMPLES])

    return make


def asdict_of(why) -> dict:
    return {"match": why.match, "set": why.set, "with": why.text}


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
                found = finders.find(source, block) if rules_of(settings, source) else [None] * len(block)
                for text, why in zip(block, found):
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


# --- All of it


def claim_output(settings: BuildSettings, output: Path) -> None:
    """Records in `output` what is built there; the same build resumes in it.

    Raises:
        ValueError: the folder holds something else, or a build with other settings or data; nothing is changed.
    """
    record = json.loads(json.dumps(describe(settings)))
    file = output / "work" / "build.json"
    if not file.is_file():
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"--output_dir {output} holds files that are not of a build; name another")
        write_json(file, record)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    if before != record and not any(output.glob("work/*/pairs")):  # nothing was built with it
        write_json(file, record)
    elif before != record:
        raise ValueError(
            f"{output} holds a build of something else: {first_difference(before, record)}; name another --output_dir, "
            "or remove this one"
        )


def describe(settings: BuildSettings) -> dict:
    """All settings that decide what is built, with digests of local data, evaluation sets and a local teacher."""
    record = asdict(settings) | {"datasets": [provenance(source) for source in settings.datasets]}
    if settings.decontaminate is not None:
        record["decontaminate"] = portable(settings.decontaminate)
    for source, entry in zip(settings.datasets, record["datasets"]):
        if source.decontaminate is not None:
            entry["decontaminate"] = portable(read_rule(source.decontaminate))
    rules = {repr(rule): rule for source in settings.datasets for rule in rules_of(settings, source)}
    files = {(name, rule.documents) for rule in rules.values() for name in rule.against if Path(name).is_file()}
    record["evaluation_sets"] = sorted(
        [Path(name).name, documents, digest_texts(DecontaminationRule([name], documents=documents))]
        for name, documents in files
    )
    model = settings.teacher.model
    if model is not None and Path(model).is_dir():
        record["teacher"]["digest"] = digest_model(Path(model))
    return record


def digest_texts(rule: DecontaminationRule) -> str:
    content = json.dumps(evaluation_texts(rule), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def build(settings: BuildSettings, output: Path, where: ExecutorArguments) -> dict:
    """Runs every step that is not done, in a folder that `claim_output` has claimed.

    Returns:
        Per set its source, the counts of each step and the SHA-256 of its files.

    Raises:
        ValueError: as the loaders, rules and models.
        RuntimeError: as `make_shards`.
    """
    logs = output / "work" / "logs"
    sets = [SetPaths(output, source.name) for source in settings.datasets]
    make_shards("pairs", partial(prepare_pairs, settings, output), [paths.pairs for paths in sets], logs, where)

    jobs = [(i, paths, n) for i, paths in enumerate(sets) for n in range(paths.summary["shards"])]
    clean = [paths.clean_shards()[n] for _, paths, n in jobs]
    make_shards("decontaminate", partial(prepare_clean, settings, jobs), clean, logs, where)
    for paths in sets:
        if not any(pq.read_metadata(shard / "pairs.parquet").num_rows for shard in paths.clean_shards()):
            raise ValueError(
                f"{paths.name}: every pair is too close to an evaluation set, so nothing is left; see the reports in "
                f"{paths.clean}, then change the rule or drop the set"
            )

    mined = [(i, paths) for i, paths in enumerate(sets) if paths.summary["mines"]]
    corpora = [paths.corpus for _, paths in mined]
    make_shards("clean-corpus", partial(prepare_clean_corpus, settings, mined), corpora, logs, where)

    if settings.teacher.model is not None and mined:
        embed_corpora(settings, [(settings.datasets[i], paths) for i, paths in mined], logs, where)

    jobs = [(paths, n) for paths in sets for n in range(paths.summary["shards"])]
    triplets = [paths.triplet_shards()[n] for paths, n in jobs]
    make_shards("mine", partial(prepare_triplets, settings, jobs), triplets, logs, where)
    return summarize(settings, sets)


def embed_corpora(settings: BuildSettings, sets: Sequence[tuple[DatasetSource, SetPaths]], logs: Path, where) -> None:
    """Embeds every clean corpus with the teacher, and writes the manifests of their vectors."""
    model = settings.teacher.load()
    jobs, made_from = [], {}
    for source, paths in sets:
        documents = TextShards.open(paths.corpus)
        instruction = source.instruction or settings.instruction or ""
        symmetric = KINDS[kind_of(source)].symmetric if source.symmetric is None else source.symmetric
        prefix = model.document_prefix(instruction if symmetric else "")
        made_from[paths.name] = MadeFrom(model.name, model.revision, prefix, model.max_length, documents.digest)
        forget_if_incomplete(paths.vectors)
        if (paths.vectors / MANIFEST).is_file():
            VectorShards(paths.vectors).check(made_from[paths.name])
        jobs += [(paths, number, prefix) for number in range(documents.shards)]
    del model
    vectors = [shard_path(paths.vectors, number) for paths, number, _ in jobs]
    make_shards("embed", partial(prepare_vectors, settings, jobs), vectors, logs, where)
    for _, paths in sets:
        documents = TextShards.open(paths.corpus)
        write_manifest(paths.vectors, made_from[paths.name], "float32", documents.rows, documents.shards)


def summarize(settings: BuildSettings, sets: Sequence[SetPaths]) -> dict:
    summary = {}
    for source, paths in zip(settings.datasets, sets):
        contamination, mining = Counter(), Counter()
        for path in paths.clean_shards():
            contamination.update(counts_of(path / "pairs.parquet"))
        if paths.summary["mines"]:
            contamination.update(json.loads((paths.corpus / "dropped.json").read_text(encoding="utf-8")))
        for path in paths.triplet_shards():
            mining.update(counts_of(path))
        summary[paths.name] = {
            "source": {name: value for name, value in asdict(source).items() if value is not None},
            "kind": paths.summary["kind"],
            "decontaminate": [portable(rule) for rule in rules_of(settings, source)],
            "counts": {
                "pairs": paths.summary["counts"],
                "decontaminate": dict(sorted(contamination.items())),
                "mine": dict(sorted(mining.items())),
            },
            "files": {path.name: sha256(path) for path in paths.triplet_shards()},
        }
    return summary


def portable(rule: DecontaminationRule) -> dict:
    """A rule with the names of files instead of where they are."""
    return asdict(rule) | {"against": [Path(name).name if Path(name).is_file() else name for name in rule.against]}


def teacher_name(settings: TeacherSettings) -> Literal["BM25"] | str:
    first = settings.model or "BM25"
    return first if settings.cross_encoder is None else f"{first}, reranked by {settings.cross_encoder}"
