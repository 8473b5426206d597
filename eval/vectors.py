"""A corpus's embeddings on disk: shards of vectors with their ids, and a manifest of what they were made from.

folder/
  manifest.json        model, revision, instruction, max_length, dtype, width, rows, a digest of the texts
  00000/vectors.npy    [rows, width] in fp32, fp16 or int8
  00000/scales.npy     int8 only: fp32 [rows], what each row is multiplied by
  00000/ids.json       one a row
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nvembed.eval.files import whole, write_json
from nvembed.eval.processes import Embed


MANIFEST = "manifest.json"
SHARD_ROWS = 50_000
DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
LARGEST = 127  # of int8


@dataclass(frozen=True)
class MadeFrom:
    """What embeddings were computed from; two sets of shards can be compared only where all of it is equal.

    Args:
        model: name of the model.
        revision: the Hub's commit or a digest of the model's files.
        instruction: as the model read it before every text; "" for documents.
        max_length: tokens of a text with its instruction.
        texts: digest of the texts and their ids, in order.
    """

    model: str
    revision: str
    instruction: str
    max_length: int
    texts: str


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}"


def write_shard(path: Path, ids: Sequence[str], embeddings: np.ndarray, dtype: str = "float32") -> None:
    """Writes one shard into the new folder `path`.

    Args:
        embeddings: fp32 `[ids, width]`.

    Raises:
        ValueError: there is not one finite embedding for every id, or `dtype` cannot hold one.
    """
    if embeddings.ndim != 2 or len(embeddings) != len(ids):
        raise ValueError(f"{path}: embeddings are {embeddings.shape} for {len(ids)} texts")
    if not np.isfinite(embeddings).all():
        raise ValueError(f"{path}: embeddings hold NaN or infinity")
    path.mkdir()
    if dtype == "int8":
        scales = np.abs(embeddings).max(axis=1, initial=0).astype(np.float32) / LARGEST
        embeddings = np.rint(embeddings / np.where(scales > 0, scales, 1)[:, None])
        np.save(path / "scales.npy", scales)
    with np.errstate(over="ignore"):  # checked below
        stored = embeddings.astype(DTYPES[dtype])
    if not np.isfinite(stored).all():
        raise ValueError(f"{path}: embeddings of up to {np.abs(embeddings).max():g} do not fit {dtype}; use float32")
    np.save(path / "vectors.npy", stored)
    (path / "ids.json").write_text(json.dumps(list(ids), ensure_ascii=False), encoding="utf-8")


def write_manifest(folder: Path, made_from: MadeFrom, dtype: str, rows: int, shards: int) -> "VectorShards":
    """Checks that all shards are there, whole and of one width, and writes the manifest.

    Raises:
        ValueError: as `VectorShards`; a shard has another number of ids than vectors, or a vector is not finite.
    """
    width = len(np.load(shard_path(folder, 0) / "vectors.npy", mmap_mode="r")[0])
    manifest = asdict(made_from) | {"dtype": dtype, "width": width, "rows": rows, "shards": shards}
    vectors = VectorShards(folder, manifest)
    for number in range(shards):
        ids, vectors_here = len(vectors.shard_ids(number)), vectors.starts[number + 1] - vectors.starts[number]
        if ids != vectors_here:
            raise ValueError(f"{shard_path(folder, number)}: {ids} ids for {vectors_here} vectors")
        if not all(np.isfinite(block).all() for block in vectors.shard_blocks(number)):
            raise ValueError(f"{shard_path(folder, number)}: embeddings hold NaN or infinity")
    write_json(folder / MANIFEST, manifest)
    return vectors


def read_manifest(folder: Path) -> dict | None:
    file = folder / MANIFEST
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def is_finished(folder: Path) -> bool:
    """Whether the folder has its manifest and every shard; a shard that was lost since is made again."""
    manifest = read_manifest(folder)
    return manifest is not None and all(shard_path(folder, n).is_dir() for n in range(manifest["shards"]))


def embed_shards(
    embed: Embed,
    ids: Sequence[str],
    texts: Sequence[str],
    folder: Path,
    made_from: MadeFrom,
    dtype: str = "float32",
    shard_rows: int = SHARD_ROWS,
) -> "VectorShards":
    """Embeds a corpus in this process, a shard at a time; an interrupted run resumes after its last complete shard.

    Raises:
        ValueError: as `write_shard` and `write_manifest`; the folder holds vectors made from something else.
    """
    if is_finished(folder):
        return VectorShards(folder).check(made_from)
    shards = -(-len(texts) // shard_rows)
    for number in tqdm(range(shards), desc="Embedding", unit="shard", disable=shards == 1):
        here = slice(number * shard_rows, (number + 1) * shard_rows)
        if not (path := shard_path(folder, number)).exists():
            with whole(path) as partial:
                write_shard(partial, ids[here], embed(list(texts[here]), made_from.instruction), dtype)
    return write_manifest(folder, made_from, dtype, len(texts), shards)


class VectorShards:
    """Shards of vectors, memory-mapped; in memory are a block of vectors at a time, and the ids only while asked for.

    Args:
        folder: see the module's text.
        manifest: None: read from the folder.

    Raises:
        ValueError: the folder has no manifest, a shard is missing, one has another width or dtype than the manifest
            says, or they have another number of vectors in all.
    """

    def __init__(self, folder: Path, manifest: dict | None = None):
        self.folder = Path(folder)
        manifest = read_manifest(self.folder) if manifest is None else manifest
        if manifest is None:
            raise ValueError(
                f"{folder} has no {MANIFEST}, so its embeddings are not finished; run embed_corpus.py again"
            )
        self.manifest = manifest
        self.width, self.rows = manifest["width"], manifest["rows"]
        self.made_from = MadeFrom(**{name: manifest[name] for name in MadeFrom.__dataclass_fields__})
        self.starts = [0]  # position of each shard's first row
        for number in range(manifest["shards"]):
            self.starts.append(self.starts[-1] + self._check_shard(shard_path(self.folder, number)))
        if self.starts[-1] != self.rows:
            raise ValueError(f"{folder}: its shards hold {self.starts[-1]} vectors, the manifest says {self.rows}")

    def _check_shard(self, path: Path) -> int:
        if not path.is_dir():
            raise ValueError(f"{path} is missing; run embed_corpus.py again")
        vectors = np.load(path / "vectors.npy", mmap_mode="r")
        if vectors.shape[1:] != (self.width,) or vectors.dtype != DTYPES[self.manifest["dtype"]]:
            raise ValueError(
                f"{path}: {vectors.dtype} vectors of shape {vectors.shape}; the manifest says "
                f"{self.manifest['dtype']} of width {self.width}"
            )
        return len(vectors)

    def __len__(self) -> int:
        return self.rows

    def check(self, made_from: MadeFrom) -> "VectorShards":
        """Itself, if it was made from the same model, instruction and texts.

        Raises:
            ValueError: it was not; the first difference is named.
        """
        for name, expected in asdict(made_from).items():
            if (found := getattr(self.made_from, name)) != expected:
                raise ValueError(
                    f"{self.folder}: its vectors were made with {name} {found!r}, needed is {expected!r}; embed the "
                    "corpus into another folder"
                )
        return self

    def ids(self) -> Iterator[str]:
        """The ids in order, read a shard at a time."""
        for number in range(len(self.starts) - 1):
            yield from self.shard_ids(number)

    def shard_ids(self, number: int) -> list[str]:
        return json.loads((shard_path(self.folder, number) / "ids.json").read_text(encoding="utf-8"))

    def blocks(self, rows: int = 50_000) -> Iterator[np.ndarray]:
        """All vectors in order, in fp32 blocks `[up to rows, width]`."""
        for number in range(len(self.starts) - 1):
            yield from self.shard_blocks(number, rows)

    def shard_blocks(self, number: int, rows: int = 50_000) -> Iterator[np.ndarray]:
        stored, scales = self._stored(number)
        for start in range(0, len(stored), rows):
            part = stored[start : start + rows].astype(np.float32, copy=False)
            yield part if scales is None else part * scales[start : start + rows, None]

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """The vectors at some positions, in their order: fp32 `[positions, width]`."""
        positions = np.asarray(positions)
        result = np.empty((len(positions), self.width), dtype=np.float32)
        owners = np.searchsorted(self.starts, positions, side="right") - 1
        for number in np.unique(owners):
            here = np.flatnonzero(owners == number)
            stored, scales = self._stored(number)
            local = positions[here] - self.starts[number]
            result[here] = stored[local]
            if scales is not None:
                result[here] *= scales[local, None]
        return result

    def _stored(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        path = shard_path(self.folder, number)
        scales = np.load(path / "scales.npy") if self.manifest["dtype"] == "int8" else None
        return np.load(path / "vectors.npy", mmap_mode="r"), scales
