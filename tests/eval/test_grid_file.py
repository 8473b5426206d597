"""The files of grids: what they say, inherit and may not say; those of the house."""

import re
from pathlib import Path

import pytest
import yaml

from nvembed.eval.ablation.claims import judge, matched
from nvembed.eval.ablation.grid import Grid, check_options
from nvembed.eval.ablation.grid_file import PARTS
from nvembed.eval.ablation.runner import Results
from nvembed.eval.ablation.zero_shot import folded
from nvembed.train.data.mining import MiningRules


ROOT = Path(__file__).parents[2]


def test_steps_and_recipes_can_be_an_axis(write_grid, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text((tmp_path / "recipe.yaml").read_text() + "\nseed: 3\n")
    axes = {"stages": {"two": {}, "one": {"steps": ["init", "stage2"]}, "other": {"recipe": "other.yaml"}}}
    grid = Grid.read(write_grid(axes=axes, steps=["init", "stage1", "stage2"]))
    two, one, changed = grid.runs()
    assert [step.name for step in one.last.chain] == ["init", "stage2"]
    assert [step.name for step in two.last.chain] == [step.name for step in changed.last.chain]
    assert two.last.chain[0] == changed.last.chain[0] and two.last.key != changed.last.key
    assert changed.last.recipe == other


def test_options_of_a_step_apply_in_the_cells_that_run_it(write_grid):
    stages = {"two": {}, "one": {"steps": ["init", "stage2"]}}
    axes = {"stages": stages, "heat": {"low": {}, "high": {"stage1": {"temperature": 1}, "stage2": {"temperature": 1}}}}
    grid = Grid.read(write_grid(axes=axes, steps=["init", "stage1", "stage2"]))
    arguments = {run.cell: [step.options for step in run.last.chain[1:]] for run in grid.runs()}
    high = arguments[("stages", "two"), ("heat", "high")]
    assert len(high) == 2 and all("--temperature" in step for step in high)
    assert len(arguments[("stages", "one"), ("heat", "high")]) == 1


LEFT_OUT = {"sets": {"all": {}, "a": {"stage1": {"leave_out": ["a"]}}}}
CLAIM = {"text": "x", "better": {"pooling": "mean"}, "worse": {"pooling": "eos"}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axis": {}}, "axis is unknown; keys are"),
        ({"axes": {"pooling": {}}}, "axis pooling has no values"),
        ({"axes": ["pooling"]}, "axes is .* must be a mapping"),
        ({"axes": {"p": ["mean"]}}, "axis p is .* must be a mapping"),
        ({"axes": {"p": {"mean": {"stage3": {}}}}}, "p: mean changes 'stage3'; it must be"),
        ({"options": {"stage3": {}}}, "options changes 'stage3'"),
        ({"options": {"stage1": None}}, "options: stage1 is None; it must be a mapping"),
        ({"options": {"stage1": {"seed": 3}}}, "stage1 sets seed, which the grid sets itself"),
        ({"options": {"stage1": {"temperature": None}}}, "temperature is None, which no command line has"),
        ({"axes": {"p": {"x": {"stage2": {"bf16": True}}}}}, "p: x sets options of stage2, which no cell"),
        ({"axes": {"p": {"a": {}, "b": {}}}}, "b is the same run as a; leave one of them out"),
        (
            {
                "axes": {
                    "stages": {"both": {}, "one": {"steps": ["init", "stage2"]}},
                    "sets": {"all": {}, "a": {"stage1": {"leave_out": ["a"]}}},
                },
                "zero_shot": {"sets": {"a": "a"}},
                "steps": ["init", "stage1", "stage2"],
            },
            "one, a is the same run as one, all",
        ),
        ({"axes": {"p": {"a, b": {}, "a": {}}, "q": {"c": {}, "b, c": {}}}}, "two cells are called 'a, b, c'"),
        ({"steps": ["init", "stage3"]}, "there is no step 'stage3'"),
        ({"steps": []}, "steps is empty; give it a value"),
        ({"start": "runs/base"}, "start is runs/base, and the steps begin with init"),
        (
            {"start": "b", "steps": ["stage1"], "axes": {"p": {"x": {"steps": ["init"]}}}},
            "start is b, and the steps beg",
        ),
        (
            {"steps": ["init"], "seeds": [1, 2], "options": {"init": {"seed": 3}}},
            "init alone, of one seed, is the same",
        ),
        ({"steps": ["stage1", "init"]}, "the steps are stage1, init; init must be the first"),
        ({"seeds": [1, 1, 1]}, r"seeds is \[1, 1, 1\]; each must be another"),
        ({"seeds": 3}, "seeds is 3; it must be a list"),
        ({"paper": {"median": 1.0}}, "paper has 'median', which is no cell"),
        ({"zero_shot": {"poling": {"mean": "scored"}}}, "zero_shot must name one axis, of pooling; not poling"),
        ({"zero_shot": {"mean": "scored"}}, "zero_shot: mean is 'scored'; it must be a mapping"),
        ({"zero_shot": {"pooling": {"mean": "scored"}}}, "pooling: mean must leave out a set"),
        ({"zero_shot": {"sets": {}}, "axes": LEFT_OUT}, "sets: a must leave out a set .* name its tasks"),
        ({"zero_shot": {"sets": {"a": "scored", "b": "x"}}, "axes": LEFT_OUT}, "'b'; sets has a, all"),
        ({"zero_shot": {"sets": {"a": ["scored", "scored"]}}, "axes": LEFT_OUT}, "names 'scored' twice"),
        ({"zero_shot": {"sets": {"a": "average"}}, "axes": LEFT_OUT}, "zero_shot names 'average'; the tasks"),
        ({"zero_shot": {"sets": {"a": "scored"}}, "axes": LEFT_OUT, "merge_seeds": True}, "merge_seeds cannot"),
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
            {"axes": {"a": {"x": {"init": {"dtype": 1}}}, "b": {"y": {"init": {"dtype": 2}}}}},
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


def test_a_recipe_that_a_step_cannot_take_is_refused_before_anything_runs(write_grid, tmp_path, monkeypatch):
    """A step that the recipe has nothing for, or settings at its top that the step's script does not know."""
    known = {"datasets", "num_negatives", "max_length", "batch_size", "max_steps", "use_cpu", "warmup_steps"}
    known |= {"base", "num_latents", "num_cross_heads", "pooling_type"}
    of = {"train/center.py": known - {"batch_size"}}
    monkeypatch.setattr("nvembed.eval.ablation.grid.known_options", lambda script: of.get(script, known))
    steps = ["init", "stage1", "center"]
    with pytest.raises(ValueError, match="recipe.yaml has stage1, stage2 and no center: add `center:`"):
        check_options(Grid.read(write_grid(steps=steps)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "center: {}\n")
    with pytest.raises(ValueError, match=r"recipe.yaml: train/center.py has no option 'batch_size'"):
        check_options(Grid.read(write_grid(steps=steps)))


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
    held_out, labels = (yaml.safe_load((folder / f"{name}-recipe.yaml").read_text()) for name in ("held-out", "labels"))
    ours = ours.replace("../../../shared/data/", "../../runs/held-out/")
    as_held_out = yaml.safe_load(ours)
    assert held_out.pop("distill") == held_out["stage2"]
    assert held_out == as_held_out
    assert labels == yaml.safe_load(re.sub("kind: (classification|clustering)", "kind: label_classification", ours))
    built = yaml.safe_load((folder / "built-recipe.yaml").read_text())
    for stage in ("stage1", "stage2"):
        for entry in as_held_out[stage]["datasets"]:
            if entry["kind"] == "retrieval":
                entry["set"] = Path(entry.pop("path")).name
                del entry["kind"], entry["instruction"]  # which the built set has
    assert built == as_held_out
    for file in folder.glob("*-data-recipe.yaml"):
        MiningRules(**yaml.safe_load(file.read_text()).get("mining", {}))
