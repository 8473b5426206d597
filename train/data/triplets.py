"""Ready triplets: rows of `query`, `positive` and, if there are, `negatives`, `instruction`, `symmetric`, `dataset`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nvembed.train.data.mine_negatives import add_negatives
from nvembed.train.data.tables import read_table, sample, text_of


if TYPE_CHECKING:
    from nvembed.train.data.registry import DatasetSource


def load(source: "DatasetSource", num_negatives: int, seed: int) -> Iterator[dict]:
    """Reads triplets, one at a time; where no row has negatives, they are mined among the positives.

    Raises:
        ValueError: a row lacks a field, has an empty text, or has fewer than `num_negatives` negatives where rows have
            any; file and line are named.
    """
    rows, have_negatives = 0, False
    for _, row in read_table(source):
        rows, have_negatives = rows + 1, have_negatives or bool(row.get("negatives"))
    chosen = None if source.samples is None else set(sample(list(range(rows)), source.samples, seed))
    records = (
        _triplet(name, row, num_negatives if have_negatives else 0)
        for position, (name, row) in enumerate(read_table(source, ("query", "positive")))
        if chosen is None or position in chosen
    )
    if have_negatives:
        yield from records
    else:
        mined = list(records)
        yield from add_negatives(mined, [record["positive"] for record in mined], num_negatives, seed)


def _triplet(name: str, row: dict, num_negatives: int) -> dict:
    negatives = row.get("negatives") or []
    if not isinstance(negatives, list):
        raise ValueError(f'{name}: "negatives" is {negatives!r}, not a list of strings')
    for position, negative in enumerate(negatives):
        text_of({f"negatives[{position}]": negative}, f"negatives[{position}]", name)
    if len(negatives) < num_negatives:
        raise ValueError(
            f"{name}: {len(negatives)} negatives and num_negatives is {num_negatives}; lower it to the fewest that a "
            "row has, or give the row more"
        )
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
