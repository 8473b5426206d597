"""Embeds a corpus into shards of vectors on disk, on any number of processes and machines, one GPU a task.

python eval/embed_corpus.py --model DIR_OR_REPO --corpus data/msmarco --output_dir vectors/msmarco --tasks 8

Run it again to resume: it makes only the shards that are missing. `nvembed.eval.vectors` describes the files.
"""

import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import faiss

from nvembed.eval.arguments import EvaluationArguments, run_script
from nvembed.eval.data.corpus import TextShards, digest_documents, read_corpus
from nvembed.eval.files import claimed, whole
from nvembed.eval.models import free_gpu_memory
from nvembed.eval.results import claim_folder
from nvembed.eval.shards import ExecutorArguments, Make, make_shards
from nvembed.eval.vectors import (
    SHARD_ROWS,
    MadeFrom,
    VectorShards,
    is_finished,
    read_manifest,
    shard_path,
    write_manifest,
    write_shard,
)


@dataclass
class EmbedArguments(ExecutorArguments, EvaluationArguments):
    corpus: str = field(kw_only=True, metadata={"help": "BEIR folder; JSONL, CSV or Parquet file; or a Hub dataset."})
    split: str = field(default="corpus", metadata={"help": "Of a folder or a Hub dataset."})
    instruction: str = field(
        default="", metadata={"help": "Task definition on every document, as in symmetric tasks; usually none."}
    )
    vectors: Literal["float32", "float16", "int8"] = field(default="float32", metadata={"help": "Type on disk."})
    shard_rows: int = field(default=SHARD_ROWS, metadata={"help": "Documents of a shard."})
    to_faiss: str | None = field(default=None, metadata={"help": "Also write a flat FAISS index (exact, fp32) here."})

    def __post_init__(self):
        EvaluationArguments.__post_init__(self)
        ExecutorArguments.__post_init__(self)
        if self.shard_rows < 1:
            raise ValueError(f"shard_rows is {self.shard_rows}; it must be 1 or more")
        if self.to_faiss is not None and Path(self.to_faiss).exists():
            raise ValueError(f"--to_faiss {self.to_faiss} exists; name another file or remove it")


def run(args: EmbedArguments) -> VectorShards:
    """Embeds what is missing, checks all shards and writes their manifest.

    Raises:
        ValueError: as `load_model`, `read_corpus`, `claim_folder` and `write_shard`; the folder holds vectors of
            another corpus, or another one runs in it.
        RuntimeError: as `make_shards`.
    """
    settings, made_from = describe(args)
    folder = claim_folder(args.output_dir, settings, {})
    with claimed(folder, "embed_corpus.py"):
        documents = claim_texts(folder, args)
        made_from = replace(made_from, texts=documents.digest)
        paths = [shard_path(folder, number) for number in range(documents.shards)]
        make_shards("embed", partial(prepare, args, documents, made_from), paths, folder / "logs", args)
        vectors = write_manifest(folder, made_from, args.vectors, documents.rows, documents.shards)
        if args.to_faiss is not None:
            write_faiss(vectors, Path(args.to_faiss))
        shutil.rmtree(documents.folder, ignore_errors=True)
    return vectors


def describe(args: EmbedArguments) -> tuple[dict, MadeFrom]:
    """The settings of the run, and what its vectors are made from but for the texts; the model is let go again.

    Raises:
        ValueError: as `load_model`; there is an instruction, and the model takes none.
    """
    model = args.load(show_progress_bar=False)
    if args.instruction:
        model.check_reads("instruction", args.instruction)
    settings = args.settings(model) | {name: getattr(args, name) for name in ("instruction", "vectors", "shard_rows")}
    prefix = model.document_prefix(args.instruction)
    made_from = MadeFrom(model.name, model.revision, prefix, model.max_length, texts="")
    del model
    free_gpu_memory()
    return settings, made_from


def claim_texts(folder: Path, args: EmbedArguments) -> TextShards:
    """The corpus as text shards in `folder`, written by the first run; a finished run has only their summary left.

    Raises:
        ValueError: the corpus is not the one that the folder's vectors are of.
    """
    texts, manifest = folder / "texts", read_manifest(folder)
    if texts.is_dir():
        digest = TextShards.open(texts).digest
    elif manifest is not None:
        digest = manifest["texts"]
    else:
        return TextShards.write(read_corpus(args.corpus, args.split), texts, args.shard_rows)
    if digest_documents(read_corpus(args.corpus, args.split)) != digest:
        raise ValueError(f"{folder} holds vectors of another corpus than {args.corpus}; name another --output_dir")
    if texts.is_dir():
        return TextShards.open(texts)
    if is_finished(folder):
        return TextShards(texts, manifest["rows"], args.shard_rows, digest)
    return TextShards.write(read_corpus(args.corpus, args.split), texts, args.shard_rows)  # a shard was lost since


def prepare(args: EmbedArguments, documents: TextShards, made_from: MadeFrom) -> Make:
    """Loads the model on a task's device; what it returns embeds one shard."""
    embed = args.load(show_progress_bar=False).embed_for_search

    def make(number: int, path: Path) -> None:
        rows = documents.shard(number)
        write_shard(path, rows["id"][:], embed(rows["text"][:], made_from.instruction), args.vectors)

    return make


def write_faiss(vectors: VectorShards, path: Path) -> None:
    """Writes a flat index of inner products; all vectors are in memory for it, 4 bytes a dimension.

    FAISS numbers documents by position; `VectorShards.ids` has their ids in that order.
    """
    index = faiss.IndexFlatIP(vectors.width)
    for block in vectors.blocks():
        index.add(block)
    with whole(path) as partial_path:
        faiss.write_index(index, str(partial_path))


def main() -> None:
    vectors = run_script("embed_corpus", EmbedArguments, run)
    print(f"{vectors.rows} vectors of width {vectors.width} in {vectors.folder}")


if __name__ == "__main__":
    from nvembed.eval import embed_corpus  # under its own name: other processes import `prepare` by it

    embed_corpus.main()
