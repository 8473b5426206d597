"""Raw data written to disk, and triplets as a stage gets them: written to disk and read again."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, concatenate_datasets

from nvembed.train.data.prepared import read_tables, write_tables
from nvembed.train.data.source import DatasetSource, check_sources


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_similarity_task(folder: Path, name: str, sentences: list[str]) -> None:
    """Writes a task of eight scored pairs, `name`, and `tasks.yaml` with it alone."""
    rows = [{"sentence1": a, "sentence2": b, "score": len(a) % 5} for a, b in zip(sentences, sentences[::-1])]
    write_jsonl(folder / name / "test.jsonl", rows)
    (folder / "tasks.yaml").write_text(f"tasks: [{{type: STS, path: {name}, instruction: Retrieve similar text}}]")


def prepare(sources: list[DatasetSource], num_negatives: int, seed: int = 0, instruction: str | None = "") -> Dataset:
    """The triplets of all sources, one after the other."""
    with TemporaryDirectory() as name:
        folder = Path(name, "triplets")
        write_tables(folder, check_sources(sources), num_negatives, seed, instruction)
        return concatenate_datasets(read_tables(folder, sources))  # memory-mapped: readable after the file is removed
