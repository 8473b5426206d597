"""The ladder and the grid: what they run, keep and refuse."""

import json
from pathlib import Path

import pytest
import yaml

from nvembed.eval.commands import make_checkpoint
from nvembed.train.compress import grid, ladder
from nvembed.train.compress.ladder import Ladder
from tests import preloaded
from tests.triplets import write_similarity_task


ROOT = Path(__file__).parents[3]


@pytest.fixture
def recipe(checkpoint, tmp_path, sentences):
    """A recipe whose ladder is to quantize the tiny checkpoint, measured by the similarity of eight pairs."""
    write_similarity_task(tmp_path, "pairs", sentences)

    def write(**changes) -> Path:
        content = {
            "quantize": {"model_name_or_path": str(checkpoint), "output_dir": str(tmp_path / "int8")},
            "ladder": {
                "output_dir": str(tmp_path / "out"), "steps": ["quantize"], "tasks": "tasks.yaml", "max_length": 64,
                "rounds": 1,
            },
        }  # fmt: skip
        for section, settings in changes.items():
            content[section] = content.get(section, {}) | settings
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "recipe.yaml"

    return write


@pytest.mark.slow
def test_a_ladder_makes_measures_and_keeps_every_step(recipe, tmp_path):
    done = preloaded.run(ROOT / "train/compress/ladder.py", recipe(), timeout=900)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "ladder.json").read_text())
    assert [result["rung"] for result in results] == ["start", "quantize"]
    dense, quantized = results
    assert quantized["disk_gb"] < dense["disk_gb"] and quantized["weights_gb"] < dense["weights_gb"]
    assert all(result["texts_per_second"] > 0 and result["peak_gb"] > 0 for result in results)
    assert dense["scores"]["pairs"] == pytest.approx(quantized["scores"]["pairs"], abs=10)
    assert "| quantize |" in (tmp_path / "out" / "LADDER.md").read_text()
    assert (tmp_path / "out" / "ladder.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="was made with weight_dtype"):
        ladder.run_ladder(Ladder.read(str(recipe(quantize={"weight_dtype": "float8_e4m3fn"}))))


def test_recipes_that_are_no_ladder_are_refused(recipe):
    with pytest.raises(ValueError, match="lacks 'distill' for a ladder"):
        Ladder.read(str(recipe(ladder={"steps": ["quantize", "distill"]})))
    with pytest.raises(ValueError, match="no step 'report'"):
        report = {"model_name_or_path": "a", "output_dir": "b"}
        Ladder.read(str(recipe(ladder={"steps": ["report"]}, report=report)))
    with pytest.raises(ValueError, match="distill begins with elsewhere, and the step before writes"):
        distill = {"model_name_or_path": "elsewhere", "output_dir": "b"}
        Ladder.read(str(recipe(ladder={"steps": ["quantize", "distill"]}, distill=distill)))
    with pytest.raises(ValueError, match="neither a file nor the name of a recipe"):
        Ladder.read("nowhere")


@pytest.mark.slow
def test_what_would_end_a_ladder_later_is_found_before_it_begins(recipe, tmp_path, monkeypatch):
    ladder.check(Ladder.read(str(recipe())))
    for changes, words in (
        ({"quantize": {"wieght_dtype": "int8"}}, "train/compress/quantize.py has no option 'wieght_dtype'"),
        ({"quantize": {"model_name_or_path": str(tmp_path / "nowhere")}}, "there is no such folder"),
        ({"ladder": {"tasks": "my-task.yaml"}}, "my-task.yaml does not exist"),
        ({"ladder": {"round": 1}}, "ladder has an unknown key 'round'"),
    ):
        with pytest.raises(ValueError, match=words):
            ladder.check(Ladder.read(str(recipe(**changes))))
        recipe()
    monkeypatch.setattr(ladder, "find_config", lambda *name: None)  # the Hub would have it
    with pytest.raises(ValueError, match="owner/name is a name on the Hub, .* download it"):
        ladder.check(Ladder.read(str(recipe(quantize={"model_name_or_path": "owner/name"}))))
    assert not (tmp_path / "int8").exists()


def test_the_ladder_that_comes_along_reads():
    found = Ladder.read("compress")
    assert list(found.steps) == ["prune", "distill", "quantize"] and found.start == "runs/smollm2/stage2"


def test_a_folder_made_otherwise_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a checkpoint that this script did not make"):
        make_checkpoint(tmp_path / "model", "train/compress/prune.py", ["--method", "wanda"], {})
    record = {"script": "train/compress/prune.py", "arguments": ["--method", "wanda"], "recipe": "a"}
    (tmp_path / "model.json").write_text(json.dumps(record))
    make_checkpoint(tmp_path / "model", "train/compress/prune.py", ["--method", "wanda"], {"recipe": "a"})  # is there
    with pytest.raises(ValueError, match="was made with arguments"):
        make_checkpoint(tmp_path / "model", "train/compress/prune.py", ["--method", "sparsegpt"], {"recipe": "a"})
    with pytest.raises(ValueError, match="was made with recipe 'a', and this run has 'b'"):
        make_checkpoint(tmp_path / "model", "train/compress/prune.py", ["--method", "wanda"], {"recipe": "b"})


def test_a_grid_shows_means_and_deviations():
    cells = {"dense": [70.0], "wanda 2:4 pruned": [50.0], "wanda 2:4 distilled": [60.0, 62.0]}
    text = grid.table(cells, ["wanda"], ["2:4"], ["distilled"])
    assert "dense: 70.00" in text and "| wanda | 2:4 | 50.00 | 61.00 ± 1.41 |" in text
