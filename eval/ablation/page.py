"""What a grid's page shows: scores beside the paper's, what became of each claim, a chart, the scores of each run."""

import csv
import statistics
from datetime import date
from pathlib import Path

from matplotlib.figure import Figure

from nvembed.eval.ablation.claims import PAIRS, TEST, Verdict, judge
from nvembed.eval.ablation.grid import MERGED, OWN, Grid
from nvembed.eval.ablation.runner import MEASURING, Results, digests_in, keys_of, merged_keys
from nvembed.eval.ablation.runs import Table, cell_name
from nvembed.eval.ablation.zero_shot import folded
from nvembed.eval.files import locked, whole, write_text
from nvembed.eval.markdown_table import markdown_table


def section(grid: Grid, results: Results, folder: Path, command: str) -> str:
    """Markdown; `folder` has the chart and the scores, as the page sees it; `command` is what makes the section."""
    is_zero_shot, own = bool(grid.zero_shot), keys_of(grid)
    failed, runs = results.failures(grid), len(grid.runs())
    waiting = [run for run in results.missing(grid) if run.key not in results.failed]
    hours = sum(seconds for key, seconds in results.seconds.items() if key in own) / 3600
    name = grid.file.stem
    digests = sorted(digests_in(code for key, code in results.code.items() if key in own))
    digests = [f"{code} (commit {results.commits[code]})" if code in results.commits else code for code in digests]
    grid, table = folded(grid, results.by_cell(grid))
    lines = [f"## {grid.title}", "", grid.caption.strip(), "" if grid.caption else None]
    lines += [markdown_table(score_rows(grid, table), len(grid.axes)), ""]
    legend = ["Scores in percent: the mean over seeds ± their standard deviation (number of seeds)."]
    legend += ["The paper's are averages of 56 tasks of MTEB, of a model of 7 B."] if grid.paper else []
    if is_zero_shot:
        legend.append(f"{OWN}: each task by a model that did not see the task's own training split, so zero-shot.")
    lines.append(" ".join(legend))
    if grid.claims:
        verdicts = [judge(grid, table, claim) for claim in grid.claims]
        has_pairs = any(len(verdict.by_pair) > 1 for verdict in verdicts)
        lines += ["", markdown_table(claim_rows(verdicts, has_pairs), 1), "", f"{TEST} {PAIRS}" if has_pairs else TEST]
    lines += ["", f"![{grid.title}: score of each cell]({(folder / f'{name}.png').as_posix()})", ""]
    if waiting:
        lines += [f"Not measured yet: {len(waiting)} of {runs} runs.", ""]
    if failed:
        lines += ["Runs that failed:", "", *(f"- {name}: {why}" for name, why in failed.items()), ""]
    made_by = [f"{library} {version}" for library, version in results.made_of.get("libraries", {}).items()]
    made_by.append(f"code {', '.join(digests) or '-'}")
    lines.append(
        f"`{command}`; {hours:.2f} hours of commands that ended, steps shared with other grids included; written "
        f"{date.today()}; {', '.join(made_by)}. The commands of each run are in {name}.commands.txt there, its scores "
        f"in [{name}.csv]({(folder / f'{name}.csv').as_posix()})."
    )
    return "\n".join(line for line in lines if line is not None) + "\n"


def score_rows(grid: Grid, table: Table) -> list[list[str]]:
    """Header and one row a cell."""
    first = next((score for one in table.values() for score in one.values()), {})
    tasks = [name for name in first if name != "average"]
    has_merged = grid.merge_seeds and len(grid.seeds) > 1
    header = [*grid.axes, "average", *tasks, *(["seeds merged"] if has_merged else [])]
    rows = [header + (["paper"] if grid.paper else [])]
    for cell in grid.cells():
        scores = table[cell_name(cell)]
        by_seed = [score for seed, score in scores.items() if seed != MERGED]
        row = [value for _, value in cell] + [shown([one["average"] for one in by_seed], with_count=True)]
        row += [shown([one[task] for one in by_seed]) for task in tasks]
        if has_merged:
            row.append(f"{scores[MERGED]['average']:.2f}" if MERGED in scores else "-")
        if grid.paper:
            known = grid.paper.get(cell_name(cell))
            row.append("-" if known is None else f"{known:.2f}")
        rows.append(row)
    return rows


def shown(scores: list[float], with_count: bool = False) -> str:
    if not scores:
        return "-"
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.2f}{spread}" + (f" ({len(scores)})" if with_count else "")


def claim_rows(verdicts: list[Verdict], has_pairs: bool) -> list[list[str]]:
    """Header and one row a claim; `has_pairs`: with the range over several pairs of rows."""
    has_paper = any(verdict.paper is not None for verdict in verdicts)
    header = ["claim", "score", "difference", *(["by pair of rows"] if has_pairs else []), "p", "verdict"]
    rows = [header + (["difference in the paper"] if has_paper else [])]
    for verdict in verdicts:
        difference = f"{statistics.mean(verdict.differences):+.2f}" if verdict.differences else "-"
        if len(verdict.differences) > 1:
            difference += f" ± {statistics.stdev(verdict.differences):.2f}"
        p = "-" if verdict.p is None else f"{verdict.p:.3f}"
        paper = "-" if verdict.paper is None else f"{verdict.paper:+.2f}"
        by_pair = sorted(verdict.by_pair)
        between = f"{by_pair[0]:+.2f} to {by_pair[-1]:+.2f}" if len(by_pair) > 1 else "-"
        row = [verdict.claim.text, verdict.claim.score, difference, *([between] if has_pairs else []), p, verdict.words]
        rows.append(row + ([paper] if has_paper else []))
    return rows


def draw(grid: Grid, results: Results, path: Path) -> None:
    """The averages of every cell: one dot a seed, a bar at their mean."""
    grid, table = folded(grid, results.by_cell(grid))
    cells = [cell_name(cell) for cell in grid.cells()]
    figure = Figure(figsize=(7, 0.8 + 0.33 * len(cells)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(cells):
        scores = [one["average"] for seed, one in table[name].items() if seed != MERGED]
        if scores:
            axes.plot([statistics.mean(scores)] * 2, [place - 0.3, place + 0.3], color="#D55E00", linewidth=2)
            axes.plot(scores, [place] * len(scores), "o", color="#0072B2", markersize=5, alpha=0.8)
    axes.set_yticks(range(len(cells)), cells)
    axes.set_ylabel(", ".join(grid.axes))
    axes.invert_yaxis()
    axes.set_xlabel("average score, %; one dot per seed, a line at the mean")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    with whole(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def write_scores(grid: Grid, results: Results, path: Path) -> None:
    """The scores in percent of every run, and of every mean of seeds, one a line, with the code that measured them.

    The average is of all tasks: a run that is measured on some alone has none.
    """
    runs, merged = grid.runs(), merged_keys(grid)
    keys = [(run.cell, str(run.seed), run.key) for run in runs]
    keys += [(cell, MERGED, merged[cell_name(cell)]) for cell in grid.cells() if merged]
    keys = [(cell, seed, key) for cell, seed, key in keys if key in results.scores]
    tasks = list(dict.fromkeys(task for _, _, key in keys for task in results.scores[key]))
    on_some = {run.key for run in runs if run.tasks}
    with whole(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([*grid.axes, "seed", *tasks, "run", "code"])
        for cell, seed, key in keys:
            found = dict(results.scores[key])
            if key in on_some:
                found.pop("average", None)
            scores = [f"{found[task]:.4f}" if task in found else "" for task in tasks]
            rows.writerow([*dict(cell).values(), seed, *scores, key, results.code.get(key + MEASURING, "")])


def put_section(page: Path, name: str, text: str) -> None:
    """Writes a grid's section into a page, in place of its earlier one if it has any.

    Grids of several folders may write into one page at a time.

    Raises:
        ValueError: the page has the section's beginning without its end.
    """
    with locked(page.parent, lambda: None, f".{page.name}.lock"):
        content = page.read_text(encoding="utf-8") if page.is_file() else "# Ablations\n"
        write_text(page, _with_section(page, content, name, text))


def _with_section(page: Path, content: str, name: str, text: str) -> str:
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    block = f"{begin}{text}{end}"
    before, found, rest = content.partition(begin)
    if not found:
        return content.rstrip("\n") + "\n\n" + block
    _, closed, after = rest.partition(end)
    if not closed:
        raise ValueError(f"{page} has {begin.strip()} and no {end.strip()}; put it behind the section's last line")
    return before + block + after
