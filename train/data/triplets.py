"""Ready triplets: rows of `query`, `positive` and, if there are, `negatives`, `instruction`, `symmetric`, `dataset`."""

from typing import TYPE_CHECKING

from nvembed.train.data.mine_negatives import add_negatives
from nvembed.train.data.tables import read_table, sample, text_of


if TYPE_CHECKING:
    from nvembed.train.data.registry import DatasetSource


def load(source: "DatasetSource", num_negatives: int, seed: int) -> list[dict]:
    """Reads triplets; where no row has negatives, they are mined among the positives.

    Raises:
        ValueError: a row lacks a field or has an empty text; file and line are named.
    """
    records = [_triplet(name, row) for name, row in read_table(source, ("query", "positive"))]
    records = sample(records, source.samples, seed)
    if not any(record["negatives"] for record in records):
        records = add_negatives(records, [record["positive"] for record in records], num_negatives, seed)
    return records


def _triplet(name: str, row: dict) -> dict:
    negatives = row.get("negatives") or []
    if not isinstance(negatives, list):
        raise ValueError(f'{name}: "negatives" is {negatives!r}, not a list of strings')
    for position, negative in enumerate(negatives):
        text_of({f"negatives[{position}]": negative}, f"negatives[{position}]", name)
    if "negative" in row:
        raise ValueError(f'{name}: "negative" is unknown; give a list of strings as "negatives"')
    if not isinstance(row.get("symmetric", False), bool):
        raise ValueError(f'{name}: "symmetric" is {row["symmetric"]!r}, not true or false')
    if not isinstance(row.get("instruction", ""), str):
        raise ValueError(f'{name}: "instruction" is {row["instruction"]!r}, not a string')
    described = {column: row[column] for column in ("instruction", "symmetric", "dataset") if column in row}
    return {
        **described,
        "query": text_of(row, "query", name),
        "positive": text_of(row, "positive", name),
        "negatives": negatives,
    }
