"""What a grid's scores say of its claims, and which scores are zero-shot."""

import csv
import math
import statistics

import pytest

from nvembed.eval.ablation.claims import judge, p_value
from nvembed.eval.ablation.grid import OWN, Claim, Grid
from nvembed.eval.ablation.page import claim_rows, write_scores
from nvembed.eval.ablation.runner import Results, Runner
from nvembed.eval.ablation.runs import cell_name
from nvembed.eval.ablation.zero_shot import folded


def test_claims_by_a_paired_t_test(write_grid):
    axes = {
        "mask": {"b": {"init": {"mask_type": "b"}}, "c": {"init": {"mask_type": "c"}}},
        "pooling": {"mean": {"init": {"pooling_type": "mean"}}, "eos": {"init": {"pooling_type": "eos"}}},
    }
    paper = {"b, mean": 72.0, "c, mean": 71.0, "b, eos": 70.0, "c, eos": 70.5}
    grid = Grid.read(write_grid(axes=axes, paper=paper, claims=[], seeds=[1, 2, 3]))
    scores = {
        "b, mean": {"1": {"average": 60.0}, "2": {"average": 61.0}, "3": {"average": 62.0}},
        "c, mean": {"1": {"average": 58.0}, "2": {"average": 59.5}, "3": {"average": 59.0}},
        "b, eos": {"1": {"average": 50.0}, "2": {"average": 55.0}, "3": {"average": 50.0}},
        "c, eos": {"1": {"average": 49.0}, "2": {"average": 52.0}, "3": {"average": 47.0}},
    }
    claim = Claim("x", {"mask": "b"}, {"mask": "c"})
    verdict = judge(grid, scores, claim)
    differences = [(2 + 1) / 2, (1.5 + 3) / 2, (3 + 3) / 2]
    assert verdict.differences == pytest.approx(differences)
    assert verdict.by_pair == pytest.approx([(2 + 1.5 + 3) / 3, (1 + 3 + 3) / 3]), "mean, then eos"
    header, row = claim_rows([verdict], True)
    assert row[header.index("by pair of rows")] == "+2.17 to +2.33"
    alone = judge(grid, scores, Claim("x", {"mask": "b", "pooling": "eos"}, {"mask": "c", "pooling": "eos"}))
    assert claim_rows([alone, verdict], True)[1][3] == "-", "one pair"
    assert claim_rows([alone], False)[0] == ["claim", "score", "difference", "p", "verdict", "difference in the paper"]
    assert verdict.paper == pytest.approx((1.0 - 0.5) / 2)
    # By hand: t = mean / (s / sqrt(3)) of 2 degrees of freedom, whose two-sided p is 1 - t / sqrt(t^2 + 2).
    t = statistics.mean(differences) / (statistics.stdev(differences) / math.sqrt(3))
    assert verdict.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert verdict.p < 0.05 and verdict.words == "holds"
    opposite = judge(grid, scores, Claim("x", {"mask": "c"}, {"mask": "b"}))
    assert opposite.words == "does not hold: the opposite does"
    del scores["c, eos"]["3"]
    assert judge(grid, scores, claim).words == "no claim: 2 of 3 seeds"
    scores["c, eos"]["3"] = {"average": 60.0}
    assert judge(grid, scores, claim).words == "within noise"
    assert p_value([1.0, 1.0]) is None
    assert p_value([1.0, 1.0, 1.0]) is None, "no training gives this"


def test_zero_shot_scores_are_of_the_run_without_the_tasks_own_set(write_grid, tmp_path):
    """Two recipes; the folded table by hand; a run is measured on what it leaves out alone."""
    axes = {
        "recipe": {"old": {}, "new": {"stage1": {"temperature": 0.05}}},
        "left out": {"nothing": {}, "a": {"stage1": {"leave_out": ["a"]}}},
    }
    claim = {"text": "x", "better": {"recipe": "new", "left out": OWN}, "worse": {"recipe": "old", "left out": OWN}}
    zero_shot = {"left out": {"a": "scored"}}
    grid = Grid.read(write_grid(axes=axes, zero_shot=zero_shot, seeds=[1, 2], claims=[claim]))
    table = {
        "old, nothing": {"1": {"scored": 70.0, "other": 1.0}, "2": {"scored": 72.0, "other": 1.0}},
        "old, a": {"1": {"scored": 60.0}, "2": {"scored": 61.0}},
        "new, nothing": {"1": {"scored": 75.0}},
        "new, a": {"1": {"scored": 62.0}, "2": {"scored": 66.0}},
    }
    view, scores = folded(grid, table)
    assert scores == {
        "old, nothing": {seed: {"scored": score, "average": score} for seed, score in (("1", 70.0), ("2", 72.0))},
        f"old, {OWN}": {seed: {"scored": score, "average": score} for seed, score in (("1", 60.0), ("2", 61.0))},
        "new, nothing": {"1": {"scored": 75.0, "average": 75.0}},
        f"new, {OWN}": {seed: {"scored": score, "average": score} for seed, score in (("1", 62.0), ("2", 66.0))},
    }
    assert judge(view, scores, view.claims[0]).differences == [2.0, 5.0]
    results = Results({}, {run.key: table[cell_name(run.cell)].get(str(run.seed)) for run in grid.runs()})
    results.scores = {key: score | {"average": 5.0} for key, score in results.scores.items() if score}
    write_scores(grid, results, tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open() as file:
        rows = {(row["recipe"], row["left out"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(rows) == 7 and rows["old", "nothing", "1"]["average"] == "5.0000"
    assert rows["new", "a", "2"]["scored"] == "66.0000" and rows["new", "a", "2"]["average"] == "", "of one task alone"
    commands = Runner(grid, tmp_path / "out", Results({})).commands()
    assert "--task_names scored" in commands["old, a, seed 1"][-1]
    assert "--task_names" not in commands["old, nothing, seed 1"][-1]
