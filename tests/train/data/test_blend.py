from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from nvembed.train.data.blend import Blend


def table(name, rows):
    return Dataset.from_list([{"query": f"{name}{i}", "dataset": name} for i in range(rows)])


def queries(blend):
    return [blend[i]["query"] for i in range(len(blend))]


def test_by_size_every_triplet_comes_once_a_pass():
    blend = Blend([table("a", 70), table("b", 30)], samples=300)
    drawn = queries(blend)
    every = {f"a{i}" for i in range(70)} | {f"b{i}" for i in range(30)}
    for start in (0, 100, 200):
        assert set(drawn[start : start + 100]) == every
    assert drawn[:100] != drawn[100:200] != sorted(drawn[100:200])


def test_every_stretch_has_its_shares():
    """In any stretch off by a few, however long it is; a plain shuffle would be off by the root of the length."""
    blend = Blend([table("a", 900), table("b", 80), table("c", 20)], samples=1000)
    sets = np.array([blend[i]["dataset"] for i in range(1000)])
    for name, share in (("a", 0.9), ("b", 0.08), ("c", 0.02)):
        counts = np.concatenate([[0], (sets == name).cumsum()])
        for length in (8, 64, 500):
            drawn = counts[length:] - counts[:-length]
            assert np.abs(drawn - share * length).max() < 2 + 2 * 3 * share, (name, length)


def test_weights_set_the_shares_and_small_sets_come_again():
    blend = Blend([table("a", 1000), table("b", 10)], samples=400, weights=[3, 1])
    drawn = queries(blend)
    count = Counter(query[0] for query in drawn)
    assert abs(count["b"] - 100) < 2
    assert set(Counter(query for query in drawn if query[0] == "b").values()) <= {9, 10, 11}
    assert len({query for query in drawn if query[0] == "a"}) == count["a"], "no triplet of the large set twice"


def test_batches_of_one_set_keep_the_shares():
    """Every eight samples are of one set, in the sets' shares; each set is used up before it repeats."""
    with pytest.raises(ValueError, match=r"b \(7 triplets\) would not fill a batch of 8"):
        Blend([table("a", 90), table("b", 7)], samples=164, together=8)
    blend = Blend([table("a", 90), table("b", 30)], samples=164, seed=1, together=8)
    drawn = queries(blend)
    batches = [{query[0] for query in drawn[start : start + 8]} for start in range(0, 164, 8)]
    assert all(len(names) == 1 for names in batches) and len(drawn) == 164
    count = Counter(name for names in batches for name in names)
    assert abs(count["a"] - 0.75 * len(batches)) <= 3.5
    for name, rows in (("a", 90), ("b", 30)):
        own = [query for query in drawn if query[0] == name]
        assert len({*own[:rows]}) == min(rows, len(own))
    assert blend.samples(16) == [sum(query[0] == name for query in drawn[:16]) for name in "ab"]


def test_order_is_the_seeds_and_no_other_sets(tmp_path):
    tables = [table("a", 50), table("b", 50)]
    drawn = queries(Blend(tables, 100, seed=1))
    assert drawn == queries(Blend(tables, 100, seed=1))
    assert drawn != queries(Blend(tables, 100, seed=2))
    with_another = queries(Blend([*tables, table("c", 50)], 150, seed=1))
    for name in "ab":
        assert [q for q in drawn if q[0] == name] == [q for q in with_another if q[0] == name]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_a_late_start_change_nothing(workers):
    blend = Blend([table("a", 13), table("b", 7)], samples=60, seed=3)
    drawn = queries(blend)
    loaded = [query for batch in DataLoader(blend, batch_size=4, num_workers=workers) for query in batch["query"]]
    assert loaded == drawn
    late = Blend([table("a", 13), table("b", 7)], samples=60, seed=3)
    assert [late[i]["query"] for i in range(41, 60)] == drawn[41:]


def test_what_cannot_be_blended():
    with pytest.raises(ValueError, match=r"needs tables with triplets, it has \[\]"):
        Blend([], 10)
    with pytest.raises(ValueError, match=r"weights are \[1, 0\] for 2 tables"):
        Blend([table("a", 3), table("b", 3)], 10, weights=[1, 0])
