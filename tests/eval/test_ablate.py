"""Grids of trainings: what they run, keep, claim and refuse."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nvembed.eval.ablation.claims import judge, p_value
from nvembed.eval.ablation.grid import Claim, Grid, check_options, find_grid
from nvembed.eval.ablation.page import put_section, section
from nvembed.eval.ablation.runner import Results, Runner, check_jobs, estimate, open_results
from tests.triplets import write_jsonl


ROOT = Path(__file__).parents[2]


@pytest.fixture
def write_grid(decoder_dir, tmp_path, sentences):
    """Writes a grid of the tiny decoder with two poolings, trained on eight pairs, measured by eight similarities."""
    rows = [{"sentence1": a, "sentence2": b, "score": len(a) % 5} for a, b in zip(sentences, sentences[::-1])]
    write_jsonl(tmp_path / "scored" / "test.jsonl", rows)
    (tmp_path / "tasks.yaml").write_text("tasks: [{type: STS, path: scored, instruction: Retrieve similar text}]")
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
    """One of its cells asks for a pooling that does not exist; a second call has that alone to do again."""
    axes = {"pooling": {name: {"init": {"pooling_type": name}} for name in ("mean", "median")}}
    command = [sys.executable, ROOT / "eval/ablate.py", write_grid(axes=axes, paper={}, claims=[])]
    command += ["--output_dir", tmp_path / "out", "--page", tmp_path / "PAGE.md"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "1 runs failed" in done.stderr, done.stderr
    state = json.loads((tmp_path / "out" / "grid.json").read_text())
    assert -100 <= state["scores"]["mean"]["1"]["scored"] == state["scores"]["mean"]["1"]["average"] <= 100
    assert "pooling_type is 'median'" in state["failed"]["median"]["1"]
    page = (tmp_path / "PAGE.md").read_text()
    assert "| mean |" in page and "Runs that failed:\n\n- median, seed 1: " in page
    assert (tmp_path / "ablations" / "grid.png").stat().st_size > 5000
    # The commands that it names are those that make the checkpoint.
    lines = (tmp_path / "out" / "commands.txt").read_text().splitlines()
    made = {line.split("--output_dir ")[1] for line in lines[1:3]}
    assert all((Path(folder) / "config.json").is_file() for folder in made)
    assert not list((tmp_path / "out").rglob("checkpoint-*"))
    before = (tmp_path / "out" / "logs").stat().st_mtime, state["seconds"]
    grid = Grid.read(command[2])
    again = Runner(grid, tmp_path / "out", open_results(grid, tmp_path / "out", False))
    assert [run.cell for run in again.results.missing(grid)] == [(("pooling", "median"),)]
    again.run()
    assert again.results.seconds == before[1], "nothing that was there was made again"
    write_jsonl(tmp_path / "pairs.jsonl", [{"query": "a", "positive": "b"}] * 8)
    with pytest.raises(ValueError, match="has results of other data .*pairs.jsonl: name another output_dir"):
        open_results(grid, tmp_path / "out", False)


def test_runs_that_begin_alike_share_their_steps(write_grid):
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
    assert "--temperature 0.01" in Runner(grid, Path("out"), taken).commands(runs[0])[2]


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axis": {}}, "axis is unknown; keys are"),
        ({"axes": {"pooling": {}}}, "axis pooling has no values"),
        ({"axes": {"p": {"mean": {"stage3": {}}}}, "claims": [], "paper": {}}, "p: mean changes 'stage3'; it must be"),
        ({"steps": ["init", "stage3"]}, "there is no step 'stage3'"),
        ({"paper": {"median": 1.0}}, "paper has 'median', which is no cell"),
        ({"claims": [{"text": "x", "better": {"pooling": "max"}, "worse": {}}]}, "claim 'x' names pooling: max"),
        ({"recipe": "none.yaml"}, "none.yaml, which is neither a file beside it nor a recipe"),
        (
            {"axes": {"a": {"x": {"init": {"seed": 1}}}, "b": {"y": {"init": {"seed": 2}}}}, "claims": [], "paper": {}},
            "axes a and b both set init.seed",
        ),
    ],
)
def test_grids_that_make_no_sense_are_refused(write_grid, changes, words):
    with pytest.raises(ValueError, match=words):
        Grid.read(write_grid(**changes))


@pytest.mark.slow
def test_an_option_that_no_script_has_is_refused_before_anything_runs(write_grid):
    options = {"stage1": {"temprature": 0.1}}
    with pytest.raises(ValueError, match="train/stage1.py has no option 'temprature'"):
        check_options(Grid.read(write_grid(options=options)))


def test_results_of_other_code_are_not_mixed_in_silence(write_grid, tmp_path):
    grid = Grid.read(write_grid())
    results = open_results(grid, tmp_path, False)
    results.scores, results.code = {"mean": {"1": {"average": 1.0}}}, {"init-1": "0123456789ab"}
    results.save(tmp_path)
    with pytest.raises(ValueError, match=r"results of other code \(0123456789ab; .*--mix_revisions"):
        open_results(grid, tmp_path, False)
    assert open_results(grid, tmp_path, True).scores == results.scores
    assert "0123456789ab" in section(grid, results, "chart.png", tmp_path)
    with pytest.raises(ValueError, match="has results of other max_length"):
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
    assert p_value([0.0, 0.0, 0.0]) == 1 and p_value([1.0, 1.0]) is None


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
    if file.stem.endswith(("-tasks", "-recipe")):
        return
    grid = Grid.read(str(file))
    assert len(grid.seeds) >= 3
    assert all(judge(grid, {}, claim).differences == [] for claim in grid.claims)
