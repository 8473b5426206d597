"""A recipe of `build_data.py`, and where a build keeps its files."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from nvembed.eval.models import LoadedModel, find_config, load_model
from nvembed.train.data.decontaminate import DecontaminationRule, read_rule
from nvembed.train.data.mining import MiningRules
from nvembed.train.data.source import DatasetSource, check_fields


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

    def check(self) -> None:
        """Raises a `ValueError` if a model is neither a folder nor on the Hub, before anything is built with it."""
        for model, revision in ((self.model, self.revision), (self.cross_encoder, None)):
            if model is not None:
                find_config(model, revision)

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


def rules_of(settings: BuildSettings, source: DatasetSource) -> list[DecontaminationRule]:
    """The rules that a set's texts are compared by: the recipe's and its own."""
    own = [] if source.decontaminate is None else [read_rule(source.decontaminate)]
    return [*([] if settings.decontaminate is None else [settings.decontaminate]), *own]
