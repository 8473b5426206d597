"""Which claims a grid's scores bear out: a paired t-test over seeds."""

import statistics
from dataclasses import dataclass

from scipy import stats

from nvembed.eval.ablation.grid import Claim, Grid
from nvembed.eval.ablation.grid_file import listed
from nvembed.eval.ablation.runs import Table, cell_name


LEVEL = 0.05
TEST = (
    "A claim compares the rows that differ in its setting alone. p: two-sided paired t-test over the seeds; below "
    f"{LEVEL:g} the claim holds, or its opposite does. Fewer than three seeds give no verdict."
)
PAIRS = (
    "Where several pairs of rows differ so, a seed's difference is the mean of theirs; the range is of the pairs' "
    "means over the seeds, which are not tested."
)


@dataclass
class Verdict:
    """
    Args:
        differences: better - worse of each seed, in points, the mean over all pairs of cells.
        by_pair: the same of each pair, the mean over the seeds.
        paper: the same of the paper's scores, if the grid has them.
        p: of no difference; None: fewer than three seeds, or no spread between them.
    """

    claim: Claim
    differences: list[float]
    by_pair: list[float]
    paper: float | None
    p: float | None

    @property
    def words(self) -> str:
        if len(self.differences) < 3:
            return f"no claim: {len(self.differences)} of 3 seeds"
        if self.p is None:
            return "no claim: no spread between seeds"
        if self.p >= LEVEL:
            return "within noise"
        return "holds" if statistics.mean(self.differences) > 0 else "does not hold: the opposite does"


def judge(grid: Grid, scores: Table, claim: Claim) -> Verdict:
    """Tests one claim on a grid's scores, those of a zero-shot grid `folded`.

    Raises:
        ValueError: no task gives the claim's score.
    """
    pairs = matched(grid, claim)
    found_differences: list[list[float]] = []  # of each seed, for each pair
    measured = next((one for by_seed in scores.values() for one in by_seed.values()), {claim.score: None})
    if claim.score not in measured:
        raise ValueError(f"{grid.file} names the score {claim.score!r}; the tasks give {listed(measured)}")
    for seed in map(str, grid.seeds):
        found = [(scores.get(a, {}).get(seed), scores.get(b, {}).get(seed)) for a, b in pairs]
        if found and all(one and other for one, other in found):
            found_differences.append([one[claim.score] - other[claim.score] for one, other in found])
    differences = [statistics.mean(of_seed) for of_seed in found_differences]
    by_pair = [statistics.mean(of_pair) for of_pair in zip(*found_differences)]
    known = [(grid.paper.get(a), grid.paper.get(b)) for a, b in pairs] if claim.score == "average" else []
    paper = None
    if known and not any(None in pair for pair in known):
        paper = statistics.mean(one - other for one, other in known)
    return Verdict(claim, differences, by_pair, paper, p_value(differences))


def p_value(differences: list[float]) -> float | None:
    """Of a mean of 0; None of fewer than three, or of ones without any spread, which no training gives."""
    if len(differences) < 3 or len({*differences}) == 1:
        return None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def matched(grid: Grid, claim: Claim) -> list[tuple[str, str]]:
    """The cells to compare, by name: each with the better values, and the one with the worse values instead."""
    pairs = []
    for cell in map(dict, grid.cells()):
        if all(cell[axis] == value for axis, value in claim.better.items()):
            other = cell | claim.worse
            pairs.append((cell_name(tuple(cell.items())), cell_name(tuple(other.items()))))
    return pairs
