"""The table that the scripts print of what they did to a decoder's matrices."""

from collections import defaultdict

from nvembed.eval.markdown_table import markdown_table


def report_table(report: list[dict]) -> str:
    """Markdown: by kind of matrix, the mean share of zeros and the outputs' mean and largest error over the layers."""
    kinds = defaultdict(list)
    for entry in report:
        kinds[entry["matrix"].split(".", 2)[2]].append(entry)
    rows = [["matrix", "zeros", "error of its outputs, mean", "largest"]]
    for kind, entries in kinds.items():
        errors = [entry["relative_error"] for entry in entries]
        zeros = sum(entry["sparsity"] for entry in entries) / len(entries)
        rows.append([f"`{kind}`", f"{zeros:.1%}", f"{sum(errors) / len(errors):.2%}", f"{max(errors):.2%}"])
    return markdown_table(rows, 1)
