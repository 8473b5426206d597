"""One order for the triplets of many data sets: each batch mixes them in the same shares (section 3.3), or has one."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from nvembed.eval.files import text_id


class Blend(TorchDataset):
    """The triplets of a whole training run, in order.

    The order depends on the seed and the data alone, not on the number of processes or loading workers, nor on
    restarts. In any n consecutive samples (batches, with `together`), a set with share s of k sets appears n*s times,
    within 2 + 2k*s. Each set is shuffled and used up before it repeats, in a new order each time; its order does not
    depend on the other sets.

    The tables stay on disk (Arrow, memory-mapped). In memory are 12 bytes for each sample and 8 for each triplet.

    Args:
        tables: triplets, one table a set.
        samples: length of the run.
        weights: shares of the sets, in any unit; None: by number of triplets, so that a run as long as all tables
            together has each triplet once.
        seed: of the order.
        together: so many consecutive samples, from the first on, are of one set: a batch. The shares are then of
            batches, and without weights, a set comes about as often as its size says.

    Raises:
        ValueError: there are no tables, one is empty, or the weights are not one positive number for each.
    """

    def __init__(
        self,
        tables: Sequence[Dataset],
        samples: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        together: int = 1,
    ):
        if not tables or not all(map(len, tables)):
            raise ValueError(f"a blend needs tables with triplets, it has {[len(table) for table in tables]}")
        if small := [f"{table[0]['dataset']} ({len(table)} triplets)" for table in tables if len(table) < together]:
            raise ValueError(
                f"batches_of_one_set: {', '.join(small)} would not fill a batch of {together}: lower the batch size, "
                "leave the set out, or set batches_of_one_set to false"
            )
        weights = [len(table) for table in tables] if weights is None else weights
        if len(weights) != len(tables) or not all(weight > 0 for weight in weights):
            raise ValueError(f"weights are {list(weights)} for {len(tables)} tables; each needs one above 0")
        self.tables, self.seed = list(tables), seed
        self.triplets = sum(map(len, tables))
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        groups = -(-samples // together)
        times, sets, draws = [], [], []
        for index, share in enumerate(shares):
            # The n-th group of a set falls at random within the n-th of equal intervals: even, but not periodic.
            count = int(groups * share) + 2
            times.append((np.arange(count) + self._rng(index, "times").random(count)) / share)
            sets.append(np.full(count, index, dtype=np.int32))
            draws.append(np.arange(count, dtype=np.int64))
        order = np.argsort(np.concatenate(times), kind="stable")[:groups]
        self._sets = np.concatenate(sets)[order].repeat(together)[:samples]
        first = (np.concatenate(draws)[order] * together).repeat(together)
        self._draws = (first + np.tile(np.arange(together), groups))[:samples]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # by set: its current pass and the order of that

    def _rng(self, index: int, *purpose: str | int) -> np.random.Generator:
        name = self.tables[index][0]["dataset"]
        return np.random.default_rng([self.seed, *(text_id(str(part)) for part in (name, *purpose))])

    def samples(self, places: int) -> list[int]:
        """How many of the first `places` samples each set has."""
        return np.bincount(self._sets[:places], minlength=len(self.tables)).tolist()

    def __len__(self) -> int:
        return len(self._sets)

    def __getitem__(self, place: int) -> dict:
        index = int(self._sets[place])
        table = self.tables[index]
        lap, turn = divmod(int(self._draws[place]), len(table))
        if self._orders.get(index, (None,))[0] != lap:
            self._orders[index] = lap, self._rng(index, "order", lap).permutation(len(table))
        return table[int(self._orders[index][1][turn])]
