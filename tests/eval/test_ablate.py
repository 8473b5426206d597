"""Grids of trainings: what they run, keep, claim and refuse."""

import csv
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

from nvembed.eval.ablate import print_plan
from nvembed.eval.ablation import provenance, runner
from nvembed.eval.ablation.claims import judge, matched, p_value
from nvembed.eval.ablation.grid import MERGED, OWN, Claim, Grid, check_options
from nvembed.eval.ablation.grid_file import PARTS, find_grid
from nvembed.eval.ablation.page import put_section, section, write_scores
from nvembed.eval.ablation.provenance import code_digest
from nvembed.eval.ablation.runner import (
    FAILED,
    MEASURING,
    Results,
    Runner,
    check_jobs,
    claimed,
    environments,
    estimate,
    keys_of,
    open_results,
)
from nvembed.eval.ablation.runs import cell_name
from nvembed.eval.ablation.zero_shot import folded
from nvembed.modeling_nvembed import NVEmbedModel
from nvembed.train.data.mining import MiningRules
from tests.triplets import write_jsonl, write_similarity_task


ROOT = Path(__file__).parents[2]


@pytest.fixture
def write_grid(decoder_dir, tmp_path, sentences):
    """Writes a grid of the tiny decoder with two poolings, trained on eight pairs, measured by eight similarities."""
    write_similarity_task(tmp_path, "scored", sentences)
    pairs = [{"query": a, "positive": b} for a, b in zip(sentences, sentences[::-1])]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    recipe = {
        "datasets": [{"path": "pairs.jsonl", "instruction": "Find it"}], "num_negatives": 1, "max_length": 64,
        "batch_size": 4, "max_steps": 2, "use_cpu": True, "warmup_steps": 0, "stage1": {}, "stage2": {},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def write(**changes) -> str:
        content = {
            "title": "Poolings", "recipe": "recipe.yaml", "steps": ["init", "stage1"], "tasks": "tasks.yaml",
            "seeds": [1], "max_length": 64,
            "options": {"init": {"base": str(decoder_dir), "num_latents": 8, "num_cross_heads": 2}},
            "axes": {"pooling": {"mean": {"init": {"pooling_type": "mean"}}, "eos": {"init": {"pooling_type": "eos"}}}},
            "paper": {"mean": 71.5, "eos": 71.0},
            "claims": [{"text": "The mean wins", "better": {"pooling": "mean"}, "worse": {"pooling": "eos"}}],
        }  # fmt: skip
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return str(tmp_path / "grid.yaml")

    return write


@pytest.mark.slow
def test_a_grid_runs_keeps_what_it_has_and_names_what_failed(write_grid, tmp_path):
    """One of its cells has a temperature that no training has; a second call has that alone to do again."""
    axes = {"temperature": {"low": {"stage1": {"temperature": 0.1}}, "none": {"stage1": {"temperature": -1.0}}}}
    grid = write_grid(axes=axes, paper={}, claims=[], merge_seeds=True, seeds=[1, 2])
    command = [sys.executable, ROOT / "eval/ablate.py", grid, "--jobs", str(min(2, os.cpu_count()))]
    command += ["--output_dir", tmp_path / "out", "--page", tmp_path / "PAGE.md"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "2 runs failed" in done.stderr, done.stderr
    results = Results(**json.loads((tmp_path / "out" / "grid.json").read_text()))
    grid = Grid.read(str(grid))
    table = results.by_cell(grid)
    assert table["low"].keys() == {"1", "2", MERGED} and table["none"] == {}
    of_what_is_there = {key + MEASURING for key in results.scores}
    assert of_what_is_there < results.seconds.keys() < keys_of(grid)
    failed = {key.removesuffix(FAILED) for key in results.seconds if key.endswith(FAILED)}
    assert len(failed) == 2 and not failed & results.seconds.keys(), "both seeds' trainings, which are not done"
    assert -100 <= table["low"][MERGED]["scored"] == table["low"][MERGED]["average"] <= 100
    assert "ValueError: temperature is -1.0; it must be > 0" in results.failed["none"]["1"]
    page = (tmp_path / "PAGE.md").read_text()
    assert "| low |" in page and "Runs that failed:\n\n- none, seed 1: ValueError: temperature is -1.0" in page
    assert (tmp_path / "ablations" / "grid.png").stat().st_size > 5000
    with (tmp_path / "ablations" / "grid.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["temperature"], row["seed"]) for row in rows] == [("low", "1"), ("low", "2"), ("low", MERGED)]
    for row in rows:
        assert float(row["average"]) == pytest.approx(table["low"][row["seed"]]["average"], abs=1e-4)
        assert row["code"] == results.code[row["run"] + MEASURING] and results.scores[row["run"]]
    assert not list((tmp_path / "out").rglob("checkpoint-*"))
    # The commands that it names make what it measured.
    lines = (tmp_path / "out" / "grid.commands.txt").read_text().splitlines()
    assert lines[0] == "# low, seed 1" and all(line.startswith(("#", "python ", "accelerate ")) for line in lines)
    merged = lines[lines.index("# low, seeds merged") + 1]
    weights = [NVEmbedModel.from_pretrained(shlex.split(merged)[i]).state_dict() for i in (3, 4, 6)]
    for name, mean in weights[2].items():
        torch.testing.assert_close(mean, (weights[0][name] + weights[1][name]) / 2)
    again = Runner(grid, tmp_path / "out", open_results(grid, tmp_path / "out", False))
    assert {run.cell for run in again.results.missing(grid)} == {(("temperature", "none"),)}
    before = dict(again.results.seconds)
    grid.axes["temperature"].pop("none")
    again.run()
    assert again.results.seconds == before, "nothing that was there was made again"
    folder = tmp_path / "out"
    with claimed(folder), pytest.raises(ValueError, match="another ablate.py runs in"), claimed(folder):
        pass
    write_jsonl(tmp_path / "pairs.jsonl", [{"query": "a", "positive": "b"}] * 8)
    with pytest.raises(ValueError, match="has results of another recipe.yaml: pairs.jsonl: name another output_dir"):
        open_results(grid, tmp_path / "out", False)


@pytest.mark.parametrize(
    "change",
    [
        {"options": {"init": {"num_latents": 9}}},
        {"steps": ["init", "stage2"]},
        {"axes": {"pooling": {"mean": {"init": {"pooling_type": "eos"}}, "eos": {"init": {"pooling_type": "mean"}}}}},
    ],
)
def test_scores_of_other_settings_are_not_taken(write_grid, tmp_path, change):
    """They are kept by all that leads to them, not by a cell's name."""
    grid = Grid.read(write_grid())
    results = open_results(grid, tmp_path, False)
    for run in grid.runs():
        results.scores[run.last.key] = {"scored": 1.0 if "mean" in run.last.chain[0].options else 2.0}
    results.save(tmp_path)
    other = Grid.read(write_grid(**change))
    found = open_results(other, tmp_path, False).by_cell(other)
    if "axes" in change:  # known by what it is, whatever it is called
        assert found == {"mean": {"1": {"scored": 2.0}}, "eos": {"1": {"scored": 1.0}}}
    else:
        assert found == {"mean": {}, "eos": {}}


@pytest.mark.parametrize("where", ["option", "recipe", "teacher"])
@pytest.mark.parametrize("file", ["scored/test.jsonl", "pairs.jsonl", "tasks.yaml", "base"])
def test_results_of_other_files_are_not_mixed(write_grid, tmp_path, decoder_dir, file, where):
    """Whether an option names the model, or the recipe."""
    shutil.copytree(decoder_dir, tmp_path / "base")
    grid = Grid.read(write_grid(options={"init": {"base": str(tmp_path / "base")}}))
    if where != "option":
        recipe, step = tmp_path / "recipe.yaml", "stage1" if where == "recipe" else "distill"
        key = "model_name_or_path" if where == "recipe" else "teacher"
        recipe.write_text(recipe.read_text() + f"\n{step}: {{{key}: {tmp_path / 'base'}}}\n")
        axes = {"temperature": {"low": {}, "high": {step: {"temperature": 0.05}}}}
        grid = Grid.read(write_grid(options={}, steps=[step], axes=axes, **PLAIN))
    open_results(grid, tmp_path, False).save(tmp_path)
    open_results(grid, tmp_path, False)
    path = tmp_path / file if file != "base" else tmp_path / "base" / "config.json"
    path.write_text(path.read_text() + " \n")
    with pytest.raises(ValueError, match=f"has results of another .*{path.name}: name another output_dir"):
        open_results(grid, tmp_path, False)


def test_a_recipe_counts_by_what_a_step_reads_of_it(write_grid, tmp_path):
    """Neither a comment nor another step's settings make a run another; a setting of its own does."""
    recipe = tmp_path / "recipe.yaml"
    common = recipe.read_text()

    def keys(text: str) -> list[str]:
        recipe.write_text(text)
        grid = Grid.read(write_grid(steps=["init", "stage1", "stage2"]))
        return [step.key for step in grid.runs()[0].last.chain]

    plain = keys(f"{common}\nstage1: {{temperature: 0.1}}\nstage2: {{temperature: 0.1}}\n")
    assert plain == keys(f"# words\n{common}\nstage1: {{temperature: 0.1}}\nstage2: {{temperature: 0.1}}\n")
    other = keys(f"{common}\nstage1: {{temperature: 0.1}}\nstage2: {{temperature: 0.2}}\n")
    assert other[:2] == plain[:2] and other[2] != plain[2]
    assert keys(f"{common}\nlora_r: 4\nstage1: {{temperature: 0.1}}\nstage2: {{}}\n")[1] != plain[1]


def test_a_recipe_that_changes_while_its_grid_runs_ends_its_runs(write_grid, tmp_path):
    grid = Grid.read(write_grid(steps=["stage1"], options={}, axes={"one": {"a": {}}}, **PLAIN))
    before = grid.runs()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "\nlora_r: 4\n")
    assert grid.runs() == before
    results = Results({})
    Runner(grid, tmp_path / "out", results).run()
    assert results.failed["a"]["1"] == f"{recipe} has changed since the grid began: run it again"
    recipe.write_text("datasets: [")
    Runner(grid, tmp_path / "out", results).run()
    assert "recipe.yaml cannot be read as YAML" in results.failed["a"]["1"]


def test_a_training_that_other_code_goes_on_with_is_of_both(write_grid, tmp_path, monkeypatch):
    grid = Grid.read(write_grid(steps=["stage1"], options={}, axes={"one": {"a": {}}}, **PLAIN))
    key = grid.runs()[0].last.key
    results = Results({}, code={key: "0123456789ab"})
    one = Runner(grid, tmp_path / "out", results)
    monkeypatch.setattr(one, "_make", lambda *given: None)
    with ThreadPoolExecutor(1) as pool:
        (one.folder_of(key) / "checkpoint-2").mkdir(parents=True)
        one._submit(pool, key, one._make)
        assert results.code[key] == ", ".join(sorted(("0123456789ab", code_digest())))
        shutil.rmtree(one.folder_of(key))
        one._submit(pool, key, one._make)
        assert results.code[key] == code_digest()


def test_runs_that_begin_alike_share_their_steps(write_grid, capsys):
    axes = {
        "pooling": {"mean": {"init": {"pooling_type": "mean"}}, "eos": {"init": {"pooling_type": "eos"}}},
        "temperature": {"low": {"stage2": {"temperature": 0.01}}, "high": {"stage2": {"temperature": 0.05}}},
    }
    steps = ["init", "stage1", "stage2"]
    grid = Grid.read(write_grid(axes=axes, steps=steps, paper={}, claims=[], seeds=[1, 2]))
    runs = grid.runs()
    assert [run.seed for run in runs] == [1] * 4 + [2] * 4, "the whole grid of a seed before the next"
    keys = {name: {run.last.chain[i].key for run in runs} for i, name in enumerate(steps)}
    assert {name: len(found) for name, found in keys.items()} == {"init": 4, "stage1": 4, "stage2": 8}
    rows = {name: (count, minutes) for name, count, minutes in estimate(grid, Results({}))}
    assert rows == {"init": (4, None), "stage1": (4, None), "stage2": (8, None), "measure": (8, None)}
    taken = Results({}, seconds={runs[0].last.key: 60, f"{runs[0].last.key}:scores": 90})
    assert {name: minutes for name, _, minutes in estimate(grid, taken)}["stage2"] == 1
    taken.seconds[f"{runs[1].last.key}:failed"] = 3600
    again = {name: (count, minutes) for name, count, minutes in estimate(grid, taken)}
    assert again["stage2"] == (7, 1), "what failed is still to be made, and tells no time"
    print_plan(grid, Runner(grid, Path("out"), taken))
    plan = capsys.readouterr().out
    assert "# eos, high, seed 2\npython train/init_checkpoint.py" in plan
    assert "| stage2 | 7 | 1.0 | 0.1 |" in plan and "| stage1 | 4 | ? | ? |" in plan
    assert "Still to run: at least 0.3 hours, 1 at a time" in plan
    lines = Runner(grid, Path("out"), taken).commands()["mean, low, seed 1"]
    assert "--temperature 0.01" in lines[2] and lines[3].startswith("python eval/run_mteb.py --model out/runs/stage2-")


def test_steps_and_recipes_can_be_an_axis(write_grid, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text((tmp_path / "recipe.yaml").read_text() + "\nseed: 3\n")
    axes = {"stages": {"two": {}, "one": {"steps": ["init", "stage2"]}, "other": {"recipe": "other.yaml"}}}
    grid = Grid.read(write_grid(axes=axes, steps=["init", "stage1", "stage2"], paper={}, claims=[]))
    two, one, changed = grid.runs()
    assert [step.name for step in one.last.chain] == ["init", "stage2"]
    assert [step.name for step in two.last.chain] == [step.name for step in changed.last.chain]
    assert two.last.chain[0] == changed.last.chain[0] and two.last.key != changed.last.key
    assert changed.last.recipe == other


PLAIN = {"claims": [], "paper": {}}  # what names the usual cells is left out
LEFT_OUT = {"sets": {"all": {}, "a": {"stage1": {"leave_out": ["a"]}}}}
CLAIM = {"text": "x", "better": {"pooling": "mean"}, "worse": {"pooling": "eos"}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axis": {}}, "axis is unknown; keys are"),
        ({"axes": {"pooling": {}}}, "axis pooling has no values"),
        ({"axes": ["pooling"]}, "axes is .* must be a mapping"),
        ({"axes": {"p": ["mean"]}}, "axis p is .* must be a mapping"),
        ({"axes": {"p": {"mean": {"stage3": {}}}}} | PLAIN, "p: mean changes 'stage3'; it must be"),
        ({"options": {"stage3": {}}}, "options changes 'stage3'"),
        ({"options": {"stage1": None}}, "options: stage1 is None; it must be a mapping"),
        ({"options": {"stage1": {"seed": 3}}}, "stage1 sets seed, which the grid sets itself"),
        ({"options": {"stage1": {"temperature": None}}}, "temperature is None, which no command line has"),
        ({"axes": {"p": {"x": {"stage2": {"bf16": True}}}}} | PLAIN, "p: x sets options of stage2, which it does not"),
        ({"axes": {"p": {"a, b": {}, "a": {}}, "q": {"c": {}, "b, c": {}}}} | PLAIN, "two cells are called 'a, b, c'"),
        ({"steps": ["init", "stage3"]}, "there is no step 'stage3'"),
        ({"steps": []}, "steps is empty; give it a value"),
        ({"start": "runs/base"}, "start is runs/base, and the steps begin with init"),
        ({"seeds": [1, 1, 1]}, r"seeds is \[1, 1, 1\]; each must be another"),
        ({"seeds": 3}, "seeds is 3; it must be a list"),
        ({"paper": {"median": 1.0}}, "paper has 'median', which is no cell"),
        ({"zero_shot": {"poling": {"mean": "scored"}}}, "zero_shot must name one axis, of pooling; not poling"),
        ({"zero_shot": {"mean": "scored"}}, "zero_shot: mean is 'scored'; it must be a mapping"),
        ({"zero_shot": {"pooling": {"mean": "scored"}}}, "pooling: mean must leave out a set"),
        ({"zero_shot": {"sets": {}}, "axes": LEFT_OUT, **PLAIN}, "sets: a must leave out a set .* name its tasks"),
        ({"zero_shot": {"sets": {"a": "scored", "b": "x"}}, "axes": LEFT_OUT, **PLAIN}, "'b'; sets has a, all"),
        ({"zero_shot": {"sets": {"a": ["scored", "scored"]}}, "axes": LEFT_OUT, **PLAIN}, "names 'scored' twice"),
        ({"zero_shot": {"sets": {"a": "average"}}, "axes": LEFT_OUT, **PLAIN}, "zero_shot names 'average'; the tasks"),
        (
            {"zero_shot": {"sets": {"a": "scored"}}, "axes": LEFT_OUT, "merge_seeds": True, **PLAIN},
            "merge_seeds cannot",
        ),
        (
            {"claims": [CLAIM | {"better": {"pooling": "max"}}]},
            "names pooling: max, which is no value .* these are eos",
        ),
        ({"claims": [CLAIM | {"worse": {}}]}, "must name other values of the same axes"),
        ({"claims": [{"text": "x", "beter": {}}]}, "must have text, better, worse"),
        ({"like": "none.yaml"}, "like: none.yaml is neither a file nor the name of a grid"),
        ({"like": 3}, "like: 3 is neither a file nor"),
        ({"like": "smollm2"}, "like: smollm2 is neither a file nor"),
        ({"like": None}, "like is empty; give it a value"),
        ({"tasks": []}, "tasks is empty; give it a value"),
        ({"paper": None}, "paper is empty; give it a value"),
        ({"caption": None}, "caption is empty; give it a value"),
        ({"claims": None}, "claims is empty; give it a value"),
        ({"claims": 3}, "a claim is 3; it must be a mapping"),
        ({"paper": {"mean": "72"}}, "paper: mean is '72'; it must be a number"),
        ({"minutes": {"stage1": "3 m"}}, "minutes: stage1 is '3 m'; it must be a number"),
        ({"minutes": {"stage3": 3}}, "minutes are given of 'stage3'; they can be of init, "),
        ({"options": {"stage2": {"temperature": 0.1}}}, "options are set of stage2, which no run has"),
        ({"tasks": ["grid.yaml"]}, "grid.yaml must have a list `tasks:`, each with a path"),
        ({"dtype": None}, "dtype is empty; give it a value"),
        ({"recipe": "none.yaml"}, "none.yaml, which is neither a file beside it nor a recipe"),
        (
            {"axes": {"a": {"x": {"init": {"dtype": 1}}}, "b": {"y": {"init": {"dtype": 2}}}}} | PLAIN,
            "axes a and b both set init.dtype",
        ),
    ],
)
def test_grids_that_make_no_sense_are_refused(write_grid, changes, words):
    with pytest.raises(ValueError, match=words):
        Grid.read(write_grid(**changes))


def test_a_grid_inherits_the_settings_of_another(write_grid, tmp_path):
    """Not its axes; its own win; paths start at the other's folder; a grid of the house goes by its name."""
    write_grid(minutes={"stage1": 3}, options={"init": {"base": "b", "num_latents": 8}, "stage1": {"max_steps": 4}})
    (tmp_path / "here").mkdir()
    axes = {"masks": {"b": {"init": {"mask_type": "b"}}, "c": {"init": {"mask_type": "c"}}}}
    own = {
        "title": "Masks",
        "like": "../grid.yaml",
        "axes": axes,
        "seeds": [7],
        "options": {"init": {"num_latents": 9}},
    }
    (tmp_path / "here" / "masks.yaml").write_text(yaml.safe_dump(own))
    grid, other = Grid.read(str(tmp_path / "here" / "masks.yaml")), Grid.read(str(tmp_path / "grid.yaml"))
    assert grid.axes == axes and (grid.title, grid.seeds, grid.claims, grid.paper) == ("Masks", [7], [], {})
    assert grid.options == {"init": {"base": "b", "num_latents": 9}, "stage1": {"max_steps": 4}}
    (tmp_path / "here" / "masks.yaml").write_text(yaml.safe_dump(own | {"steps": ["init"], "minutes": {"init": 1}}))
    short = Grid.read(str(tmp_path / "here" / "masks.yaml"))
    assert [step.name for step in short.runs()[0].last.chain] == ["init"], "the other's options of stage1 do no harm"
    for name in ("recipe", "tasks", "steps", "max_length", "minutes"):
        assert getattr(grid, name) == getattr(other, name), name
    (tmp_path / "here" / "masks.yaml").write_text(yaml.safe_dump(own | {"like": "poolings"}))
    inherited = Grid.read(str(tmp_path / "here" / "masks.yaml"))
    assert inherited.recipe.name == "held-out-recipe.yaml" and inherited.options["init"]["num_layers"] == 2
    (tmp_path / "here" / "masks.yaml").write_text(yaml.safe_dump(own))
    (tmp_path / "grid.yaml").write_text("like: here/masks.yaml\n")
    with pytest.raises(ValueError, match=r"like goes round: masks.yaml -> grid.yaml -> masks.yaml; name another"):
        Grid.read(str(tmp_path / "here" / "masks.yaml"))


@pytest.mark.slow
def test_an_option_that_no_script_has_is_refused_before_anything_runs(write_grid):
    options = {"stage1": {"temprature": 0.1}}
    with pytest.raises(ValueError, match="train/stage1.py has no option 'temprature'"):
        check_options(Grid.read(write_grid(options=options)))


def test_results_of_other_code_are_not_mixed_in_silence(write_grid, tmp_path, monkeypatch):
    grid = Grid.read(write_grid())
    results = open_results(grid, tmp_path, False)
    last = grid.runs()[0].last.key
    results.scores, results.code = {last: {"average": 1.0}}, {last: "0123456789ab", "of another grid": "ba9876543210"}
    results.commits = {"0123456789ab": "bf647fc"}
    results.seconds = {last: 360.0, f"{last}:scores": 36.0, "of another grid": 3600.0}
    results.save(tmp_path)
    monkeypatch.setattr(provenance, "version", lambda name: "0.1")
    with pytest.raises(
        ValueError, match=r"has results of libraries .*, not \{'torch': '0.1', .*: name another output_dir"
    ):
        open_results(grid, tmp_path, True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"results of other code \(0123456789ab, ba9876543210; .*--mix_revisions"):
        open_results(grid, tmp_path, False)
    assert open_results(grid, tmp_path, True).scores == results.scores
    text = section(grid, results, Path("charts"), "python eval/ablate.py")
    assert "0.11 hours of commands" in text and "code 0123456789ab (commit bf647fc). " in text, "of this grid alone"
    with pytest.raises(ValueError, match="has results of max_length 64, not 32"):
        open_results(Grid.read(write_grid(max_length=32)), tmp_path, True)
    with pytest.raises(ValueError, match="jobs is 0; it must be 1 to"):
        check_jobs(0)
    with pytest.raises(ValueError, match="neither a file nor the name of a grid; the grids are .*poolings"):
        find_grid("pooling")


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
    grid = Grid.read(write_grid(axes=axes, zero_shot=zero_shot, seeds=[1, 2], **PLAIN | {"claims": [claim]}))
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


@pytest.mark.parametrize("visible", ["", "4,5"])
def test_jobs_get_a_share_of_the_cores_and_the_gpus_in_turn(monkeypatch, visible):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(runner, "cores", lambda: 12)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    given = [(one["CUDA_VISIBLE_DEVICES"], one["OMP_NUM_THREADS"]) for one in environments(3)]
    assert given == [(device, "4") for device in (["4", "5", "4"] if visible else ["0", "1", "0"])]
    check_jobs(12)
    with pytest.raises(ValueError, match="jobs is 13; it must be 1 to 12, the number of cores"):
        check_jobs(13)


def test_trainings_move_to_the_gpu(write_grid):
    cpu, gpu = Grid.read(write_grid()), Grid.read(write_grid())
    gpu.train_on_gpu()
    for on_cpu, on_gpu in zip(cpu.runs(), gpu.runs()):
        for before, after in zip(on_cpu.last.chain, on_gpu.last.chain):
            is_training = after.name != "init"
            assert after.options == (*before.options, *(("--use_cpu", "false") if is_training else ()))
            assert (after.key != before.key) == is_training, "results of both never mix"
    both = {"where": {"cpu": {"stage1": {"use_cpu": True}}, "gpu": {"stage1": {"use_cpu": False}}}}
    with pytest.raises(ValueError, match="axis where sets use_cpu: leave it, or --use_gpu, out"):
        Grid.read(write_grid(axes=both, paper={}, claims=[])).train_on_gpu()
    sizes = {"latents": {"4": {"init": {"num_latents": 4}}, "8": {"init": {"num_latents": 8}}}}
    with pytest.raises(ValueError, match="--use_gpu is for trainings, and no run has one"):
        Grid.read(write_grid(axes=sizes, steps=["init"], options={}, paper={}, claims=[])).train_on_gpu()


def test_a_page_keeps_its_other_sections(tmp_path):
    page = tmp_path / "PAGE.md"
    page.write_text("# Ablations\n\nWords.\n")
    put_section(page, "one", "## One\n")
    put_section(page, "two", "## Two\n")
    put_section(page, "one", "## One again\n")
    text = page.read_text()
    assert text.index("Words.") < text.index("## One again") < text.index("## Two") and "## One\n" not in text
    page.write_text(text.replace("<!-- end one -->\n", ""))
    with pytest.raises(ValueError, match="begin one --> and no <!-- end one -->"):
        put_section(page, "one", "## One\n")


@pytest.mark.parametrize("file", sorted((ROOT / "eval/ablations").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_grids_of_the_house_are_grids(file):
    if file.stem.endswith(PARTS):
        return
    grid = Grid.read(str(file))
    assert grid.caption and (len(grid.seeds) >= 3 or not grid.claims)
    view, scores = folded(grid, Results({}).by_cell(grid))
    assert all(matched(view, claim) and judge(view, scores, claim).differences == [] for claim in view.claims)


def test_the_grids_recipes_are_the_houses_own():
    """On held-out splits, with classes by their labels, and with built retrieval sets; in all else smollm2.yaml."""
    folder = ROOT / "eval/ablations"
    ours = (ROOT / "train/recipes/smollm2.yaml").read_text()
    held_out, labels = ((folder / f"{name}-recipe.yaml").read_text() for name in ("held-out", "labels"))
    as_held_out = yaml.safe_load(ours.replace("../../../shared/data/", "../../runs/held-out/"))
    assert yaml.safe_load(held_out) == as_held_out
    by_labels = re.sub("kind: (classification|clustering)", "kind: label_classification", held_out)
    assert yaml.safe_load(labels) == yaml.safe_load(by_labels)
    built = yaml.safe_load((folder / "built-recipe.yaml").read_text())
    for stage in ("stage1", "stage2"):
        for entry in as_held_out[stage]["datasets"]:
            if entry["kind"] == "retrieval":
                entry["set"] = Path(entry.pop("path")).name
                del entry["kind"], entry["instruction"]  # which the built set has
    assert built == as_held_out
    for file in folder.glob("*-data-recipe.yaml"):
        MiningRules(**yaml.safe_load(file.read_text()).get("mining", {}))
