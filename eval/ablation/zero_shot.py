"""Zero-shot scores: of each task, by the run that left its own training split out."""

import statistics
from dataclasses import replace

from nvembed.eval.ablation.grid import OWN, Grid
from nvembed.eval.ablation.runs import Table, cell_name


def folded(grid: Grid, table: Table) -> tuple[Grid, Table]:
    """A zero-shot grid and its scores as those of a plain one; any other as it is.

    The axis that leaves sets out becomes one of two values: the one that leaves out nothing, and `OWN`, whose score of
    a task is that of the run without the task's own set. Seeds that lack a score are left out.
    """
    if not grid.zero_shot:
        return grid, table
    ((axis, tasks_of),) = grid.zero_shot.items()
    axes = {name: dict.fromkeys(values, {}) for name, values in grid.claimable().items()}
    view = replace(grid, axes=axes, zero_shot={})
    scores: Table = {}
    for cell in view.cells():
        by_seed = scores.setdefault(cell_name(cell), {})
        for seed in map(str, grid.seeds):
            found = {}
            for value, tasks in tasks_of.items():
                own = dict(cell) | ({axis: value} if dict(cell)[axis] == OWN else {})
                measured = table[cell_name(tuple(own.items()))].get(seed, {})
                found |= {task: measured[task] for task in tasks if task in measured}
            if len(found) == len(grid.zero_shot_tasks()):
                by_seed[seed] = found | {"average": statistics.mean(found.values())}
    return view, scores
