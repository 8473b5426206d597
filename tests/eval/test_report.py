"""Averages against the paper's, tables, the chart, metadata that the Hub's own parser reads."""

import csv
import json
from importlib.resources import files

import pytest
from huggingface_hub import ModelCard
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from nvembed.eval.plots import COLORS, HATCHES
from nvembed.eval.report import (
    Run,
    average_rows,
    card_metadata,
    compare,
    draw,
    main,
    read_run,
    task_rows,
    write_report,
)
from nvembed.eval.results import CATEGORIES


# arXiv 2405.17428v3: categories in the order of CATEGORIES, then the average of 56.
PAPER = {
    "NV-Embed-v2": (62.65, 60.65, 58.46, 88.67, 90.37, 84.31, 30.70, 72.31),
    "NV-Embed-v1": (59.36, 60.59, 52.80, 86.91, 87.35, 82.84, 31.20, 69.32),
    "E5-mistral-7b": (56.90, 60.21, 50.26, 88.34, 78.47, 84.66, 31.40, 66.63),
}


@pytest.fixture
def released(tmp_path):
    """NV-Embed-v2's scores as a JSON list."""
    tasks = json.loads((files("nvembed.eval") / "references.json").read_text())["tasks"]
    path = tmp_path / "released.json"
    path.write_text(json.dumps([{"task": task, **row} for task, row in tasks.items()]))
    return path


@pytest.fixture
def run_folder(tmp_path):
    """What run_mteb.py leaves: two tasks, one of the paper's."""
    types = {"SciFact": "Retrieval", "mine": "STS"}
    details = {
        name: {"type": kind, "metric": {"STS": "cosine_spearman"}.get(kind, "ndcg_at_10"), "splits": ["test"],
               "dataset": "mteb/scifact" if name == "SciFact" else "mine", "dataset_revision": "r1"}
        for name, kind in types.items()
    }  # fmt: skip
    summary = {"tasks": {"SciFact": 0.7, "mine": 0.5}, "details": details, "model": "me/model", "revision": "abc"}
    folder = tmp_path / "run"
    for name, seconds in (("SciFact", 90.0), ("mine", 30.0)):
        file = folder / "results" / "me__model" / "abc" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"evaluation_time": seconds}))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_released_scores_give_the_papers_averages(released):
    averages = compare([read_run(str(released))]).averages
    for name, row in {**PAPER, "released": PAPER["NV-Embed-v2"]}.items():
        assert list(averages[name].values()) == pytest.approx(list(row), abs=0.05)
        assert list(averages[name]) == [*CATEGORIES, "average"]


def test_only_like_is_compared_with_like(released, run_folder):
    """A category that a model lacks a task of has no average; NV-Embed-v2's is over the same tasks."""
    mine = read_run(str(run_folder))
    averages = compare([mine]).averages
    assert averages["me/model"] == pytest.approx({"Retrieval": 70.0, "STS": 50.0, "average": 60.0})
    released_score = json.loads(released.read_text())
    (scifact,) = [row["score"] for row in released_score if row["task"] == "SciFact"]
    assert averages["NV-Embed-v2"] == {"Retrieval": pytest.approx(scifact), "STS": None, "average": None}
    assert "NV-Embed-v1" not in averages, "nothing to set beside"

    both = compare([mine, read_run(str(released))])
    assert both.averages["me/model"]["Retrieval"] is None, "one of 15 tasks is no average to set beside 15"
    assert both.averages["released"]["Retrieval"] == pytest.approx(62.65, abs=0.05)
    rows = {row[0]: row for row in task_rows(both)}
    difference = 70.0 - scifact
    assert rows["SciFact"][3:] == ["70.00", f"{scifact:.2f}", f"{scifact:.2f}", f"{difference:+.2f}", "+0.00"]
    assert rows["mine"][3:] == ["50.00", "-", "-", "-", "-"]
    assert average_rows(compare([mine]))[1] == ["me/model", "70.00", "50.00", "60.00", "2.0"]


def test_a_run_called_as_a_model_of_the_papers_is_refused(run_folder):
    """Its scores would be the paper's, or the paper's its own."""
    mine = read_run(str(run_folder))
    mine.name = "NV-Embed-v2"
    with pytest.raises(ValueError, match="a run is called 'NV-Embed-v2', as one of the paper's models"):
        compare([mine])
    mine.tasks, mine.types = {"mine": 50.0}, {"mine": "STS"}
    assert list(compare([mine]).averages) == ["NV-Embed-v2"], "nothing of the paper's beside it"


def test_files(released, run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["report", str(run_folder), str(released), "--output_dir", str(tmp_path / "report")]
    )
    main()
    report = tmp_path / "report"
    names = ["averages.csv", "metadata-me__model.yaml", "report.md", "report.png", "tasks.csv"]
    assert sorted(path.name for path in report.iterdir()) == names
    with (report / "tasks.csv").open() as file:
        table = {row["task"]: row for row in csv.DictReader(file)}
    assert len(table) == 57
    assert float(table["NQ"]["released"]) == pytest.approx(73.57, abs=0.005)
    assert table["mine"]["NV-Embed-v2"] == "", "an empty cell, not a dash, where there is no number"
    assert "| SciFact | Retrieval | ndcg_at_10 | 70.00 |" in (report / "report.md").read_text()
    assert "| NV-Embed-v1 | 59.36 |" in capsys.readouterr().out


def test_odd_runs(run_folder, tmp_path):
    """Nothing in common, a bar in a name, a local task with the name of the paper's, an aggregated task."""
    runs = [Run("a|b", {"t": 1.0}, {"t": "STS"}), Run("c", {"t": -9.0, "u": 1.0}, {"t": "STS", "u": "Retrieval"})]
    with pytest.raises(ValueError, match="no category of tasks in common, so no average; report each alone"):
        write_report([runs[0], Run("d", {"u": 1.0}, {"u": "STS"})], str(tmp_path / "none"))
    write_report(runs, str(tmp_path / "odd"))
    assert "a\\|b" in (tmp_path / "odd" / "report.md").read_text()

    summary = json.loads((run_folder / "summary.json").read_text())
    summary["details"]["SciFact"]["dataset"] = "my_folder"
    (run_folder / "summary.json").write_text(json.dumps(summary))
    (run_folder / "results" / "me__model" / "abc" / "mine.json").write_text('{"evaluation_time": null}')
    run = read_run(str(run_folder))
    assert run.seconds == {"SciFact": 90.0, "mine": 0.0}
    assert list(compare([run]).averages) == ["me/model"], "one's own SciFact is not compared with the paper's"
    run.details["SciFact"] |= {"dataset": None, "dataset_revision": None}
    result = ModelCard(f"---\n{card_metadata(run)}---\n").data.eval_results[0]
    assert (result.dataset_name, result.dataset_type) == ("MTEB SciFact", "mteb/SciFact")


def test_metadata_is_read_by_the_hubs_own_parser(run_folder):
    card = ModelCard(f"---\n{card_metadata(read_run(str(run_folder)))}---\n# A card\n")
    found = {(r.dataset_name, r.metric_type): r for r in card.data.eval_results}
    result = found["MTEB SciFact", "ndcg_at_10"]
    assert (result.dataset_type, result.dataset_revision, result.metric_value) == ("mteb/scifact", "r1", 70.0)
    assert (result.task_type, result.dataset_split) == ("Retrieval", "test")
    assert found["mine", "main_score"].metric_value == 50.0
    assert card.data.model_name == "me/model"


def test_chart(released, tmp_path, monkeypatch):
    """Nothing outside the picture, no label on another, a colour and a hatch of its own for each model."""
    first = read_run(str(released))
    second = Run("a-model/with-a-rather-long-name-of-its-own", {t: s - 5 for t, s in first.tasks.items()}, first.types)
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: (kept.append(figure), save(figure, path, **how)))
    draw(compare([first, second]), tmp_path / "chart.png")
    (figure,) = kept
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    edge = figure.bbox
    texts = [*axes.get_xticklabels(), *axes.texts, *figure.legends[0].get_texts(), axes.yaxis.label]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) > 30
    assert all(edge.x0 <= b.x0 and b.x1 <= edge.x1 and edge.y0 <= b.y0 and b.y1 <= edge.y1 for b in boxes)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    styles = {(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in axes.containers if len(bars)}
    assert len(styles) == 5
    assert len(set(COLORS)) == len(set(HATCHES)) == len(COLORS)
    assert imread(tmp_path / "chart.png")[:, 0].min() == 1.0, "a white margin: nothing runs over it"


def test_bad_input(released, run_folder, tmp_path, monkeypatch):
    for path, content, words in (
        ("none.json", None, "none.json does not exist; name a folder that run_mteb.py wrote"),
        ("bad.json", "{", "bad.json cannot be read as JSON"),
        ("other.json", "{}", "other.json is neither a summary of run_mteb.py nor a list of task, type, score"),
        ("list.json", '[{"task": "a"}]', "is neither a summary"),
    ):
        if content is not None:
            (tmp_path / path).write_text(content)
        with pytest.raises(ValueError, match=words):
            read_run(str(tmp_path / path))
    (run_folder / "summary.json").unlink()
    with pytest.raises(ValueError, match="summary.json does not exist: the run is not finished"):
        read_run(str(run_folder))
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(ValueError, match="empty.json is neither .*it is empty"):
        read_run(str(tmp_path / "empty.json"))
    one, other = Run("a", {"t": 1.0}, {"t": "STS"}), Run("b", {"t": 1.0}, {"t": "Retrieval"})
    with pytest.raises(ValueError, match="t is of type STS in one run and Retrieval in b"):
        compare([one, other])
    with pytest.raises(ValueError, match="two runs are called 'a'; give each a name of its own with --names"):
        compare([one, one])
    with pytest.raises(ValueError, match="a is a list of scores without data sets"):
        card_metadata(one)
    arguments = ["report", str(released), "--output_dir", str(tmp_path / "r"), "--names", "x", "y"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match="report: 2 --names for 1 runs"):
        main()
    assert not (tmp_path / "r").exists()
