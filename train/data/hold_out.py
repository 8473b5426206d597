"""Cuts a held-out split from training splits, to choose settings on: never on a test set.

    python train/data/hold_out.py --data data/banking77 data/squad --output_dir runs/held-out --share 0.1

Writes a folder for each set with `train` (what is left) and `dev`: JSONL, or a BEIR folder's judgements with its corpus
and queries. A row's side follows from its text alone (of a pair, the first; but for case and punctuation): equal texts
are on one side, and other rows in a file, or another order, change nothing. The second texts of pairs can be on both. A
BEIR folder's query is on the side of its document, of several the most relevant: all queries of one document are on one
side; the other documents of a query, and equal queries of different documents, can be on both.
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from nvembed.eval.commands import errors_in_one_line
from nvembed.eval.data import tables
from nvembed.eval.data.beir import read_beir
from nvembed.eval.files import text_id, whole
from nvembed.train.data.words import normalize


KEYS = ("text", "query", "anchor", "sentence1")  # the column that decides a row's side


def is_held_out(text: str, share: float) -> bool:
    """Whether a text is on the held-out side: `share` of all texts are, by a hash."""
    return text_id(f"held out\0{normalize(text)}") % 10_000 < share * 10_000


def hold_out(folder: Path, target: Path, share: float) -> dict[str, int]:
    """Writes a set's two splits; returns how many rows, or judgements, each has.

    Raises:
        ValueError: the folder is no set, or one side would be empty.
        FileExistsError: the target exists.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; name another output_dir, or remove it")
    if (folder / "corpus.jsonl").is_file():
        return _hold_out_beir(folder, target, share)
    files = tables.find_tables(folder, "train")
    if not files:
        raise ValueError(f"{folder} has neither corpus.jsonl nor train.jsonl, .csv or .parquet")
    sides: dict[str, list[dict]] = {"train": [], "dev": []}
    for name, row in (row for file in files for row in tables.read_table(file)):
        key = next((column for column in KEYS if column in row), None)
        if key is None:
            raise ValueError(f"{name} has none of the columns {', '.join(KEYS)}; found {sorted(row)}")
        sides["dev" if is_held_out(tables.text_of(row, key, name), share) else "train"].append(row)
    check_sides(folder, sides, share)
    with whole(target) as partial:
        partial.mkdir(parents=True)
        for split, rows in sides.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (partial / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {split: len(rows) for split, rows in sides.items()}


def _hold_out_beir(folder: Path, target: Path, share: float) -> dict[str, int]:
    data = read_beir(str(folder), "train")
    sides: dict[str, list[tuple[str, str, int]]] = {"train": [], "dev": []}
    for query, judgements in data.qrels.items():
        best = max(judgements, key=judgements.get)  # its others may be on both sides
        side = sides["dev" if is_held_out(data.corpus[best], share) else "train"]
        side += [(query, document, grade) for document, grade in judgements.items()]
    check_sides(folder, sides, share)
    with whole(target) as partial:
        (partial / "qrels").mkdir(parents=True)
        for name in ("corpus.jsonl", "queries.jsonl"):
            shutil.copyfile(folder / name, partial / name)
        for split, rows in sides.items():
            lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in rows)]
            (partial / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {split: len(rows) for split, rows in sides.items()}


def check_sides(folder: Path, sides: dict[str, Iterable], share: float) -> None:
    if not all(sides.values()):
        raise ValueError(f"{folder}: share {share} leaves nothing for one of the splits; change it, or give more rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="folders of sets, with a split train")
    parser.add_argument("--output_dir", required=True, help="a folder for each set is made in it")
    parser.add_argument("--share", type=float, default=0.1, help="of the texts, to hold out")
    args = parser.parse_args()
    if not 0 < args.share < 1:
        raise ValueError(f"share is {args.share}; it must be between 0 and 1")
    for name in tqdm(args.data, desc="Sets"):
        folder = Path(name).resolve()
        counts = hold_out(folder, Path(args.output_dir, folder.name), args.share)
        tqdm.write(f"{folder.name}: {counts['train']:,} to train on, {counts['dev']:,} held out")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
