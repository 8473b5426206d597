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
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from nvembed.eval.data.corpus import TextShards
from nvembed.eval.files import sha256, write_json
from nvembed.eval.models import digest_model, find_config, free_gpu_memory
from nvembed.eval.shards import ExecutorArguments, make_shards
from nvembed.eval.vectors import (
    MadeFrom,
    VectorShards,
    is_finished,
    shard_path,
    write_manifest,
)
from nvembed.train.data.build_settings import BuildSettings, SetPaths, TeacherSettings, rules_of
from nvembed.train.data.build_steps import (
    counts_of,
    prepare_clean,
    prepare_clean_corpus,
    prepare_pairs,
    prepare_triplets,
    prepare_vectors,
)
from nvembed.train.data.decontaminate import DecontaminationRule, evaluation_texts, read_rule
from nvembed.train.data.kinds import KINDS, kind_of
from nvembed.train.data.prepared import first_difference, provenance
from nvembed.train.data.source import DatasetSource


DIGESTS = ("digest", "digest of the cross-encoder")  # of the teacher's models, in the record of a build


def claim_output(settings: BuildSettings, output: Path) -> None:
    """Records in `output` what is built there; the same build resumes in it.

    Raises:
        ValueError: the folder holds something else, or a build with other settings or data; nothing is changed.
    """
    record = json.loads(json.dumps(describe(settings)))
    file = output / "work" / "build.json"
    check_is_free(output)
    if not file.is_file():
        write_json(file, record)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for name in {*DIGESTS} - before.get("teacher", {}).keys():  # an earlier version did not record it
        record["teacher"].pop(name, None)
    if before != record and not any(output.glob("work/*/pairs")):  # nothing was built with it
        write_json(file, record)
    elif before != record:
        raise ValueError(
            f"{output} holds a build of something else: {first_difference(before, record)}; name another --output_dir, "
            "or remove this one"
        )


def check_is_free(output: Path) -> None:
    """Raises a `ValueError` if a folder holds other things than a build."""
    work = output / "work"
    if (work / "build.json").is_file() or not output.exists():
        return
    is_free = output.is_dir() and all(path == work for path in output.iterdir())
    if not is_free or (work.exists() and any(not path.name.startswith(".") for path in work.iterdir())):
        raise ValueError(f"--output_dir {output} holds files that are not of a build; name another")


def describe(settings: BuildSettings) -> dict:
    """All settings that decide what is built, with digests of local data, evaluation sets and models, or commits."""
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
    teacher = settings.teacher
    models = ((teacher.model, teacher.revision), (teacher.cross_encoder, None))
    for key, (name, revision) in zip(DIGESTS, models, strict=True):
        if name is not None:
            _, commit = find_config(name, revision)
            record["teacher"][key] = commit or digest_model(Path(name))
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
    make_shards("pairs", partial(prepare_pairs, settings), [paths.pairs for paths in sets], logs, where)

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
        instruction = (settings.instruction or "") if source.instruction is None else source.instruction
        symmetric = KINDS[kind_of(source)].symmetric if source.symmetric is None else source.symmetric
        prefix = model.document_prefix(instruction if symmetric else "")
        made_from[paths.name] = MadeFrom(model.name, model.revision, prefix, model.max_length, documents.digest)
        if is_finished(paths.vectors):
            VectorShards(paths.vectors).check(made_from[paths.name])
        jobs += [(paths, number, prefix) for number in range(documents.shards)]
    del model
    free_gpu_memory()
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


def teacher_name(settings: TeacherSettings) -> str:
    first = settings.model or "BM25"
    return first if settings.cross_encoder is None else f"{first}, reranked by {settings.cross_encoder}"
