"""Grids of trainings: what is run, kept, shared, named as failed and not mixed."""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nvembed.eval.ablate import main, print_plan
from nvembed.eval.ablation import provenance, runner
from nvembed.eval.ablation.grid import MERGED, Grid
from nvembed.eval.ablation.grid_file import find_grid
from nvembed.eval.ablation.page import put_section, section
from nvembed.eval.ablation.provenance import code_digest
from nvembed.eval.ablation.runner import (
    FAILED,
    MEASURING,
    Results,
    Runner,
    check_jobs,
    environments,
    estimate,
    keys_of,
    open_results,
)
from nvembed.eval.ablation.runs import cell_name
from nvembed.eval.files import claimed
from nvembed.modeling_nvembed import NVEmbedModel
from tests import preloaded
from tests.triplets import write_jsonl


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_grid_runs_keeps_what_it_has_and_names_what_failed(write_grid, tmp_path):
    """One of its cells has a temperature that no training has; a second call has that alone to do again."""
    axes = {"temperature": {"low": {"stage1": {"temperature": 0.1}}, "none": {"stage1": {"temperature": -1.0}}}}
    grid = write_grid(axes=axes, merge_seeds=True, seeds=[1, 2])
    command = [ROOT / "eval/ablate.py", grid, "--jobs", str(min(2, os.cpu_count()))]
    command += ["--output_dir", tmp_path / "out", "--page", tmp_path / "PAGE.md"]
    done = preloaded.run(*command, timeout=900)
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
    assert "ValueError: temperature is -1.0; it must be > 0" in results.failures(grid)["none, seed 1"]
    assert len(results.failed) == 2
    page = (tmp_path / "PAGE.md").read_text()
    assert "Not measured yet" not in page
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
    with (
        claimed(folder, "ablate.py"),
        pytest.raises(ValueError, match="another ablate.py runs in"),
        claimed(folder, "ablate.py"),
    ):
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
@pytest.mark.parametrize(
    "file", ["scored/test.jsonl", "scored/new.jsonl", "pairs.jsonl", "tasks.yaml", "base/config.json"]
)
def test_results_of_other_files_are_not_mixed(write_grid, tmp_path, decoder_dir, file, where):
    """Whether an option names the model, or the recipe."""
    shutil.copytree(decoder_dir, tmp_path / "base")
    grid = Grid.read(write_grid(options={"init": {"base": str(tmp_path / "base")}}))
    if where != "option":
        recipe, step = tmp_path / "recipe.yaml", "stage1" if where == "recipe" else "distill"
        key = "model_name_or_path" if where == "recipe" else "teacher"
        recipe.write_text(recipe.read_text() + f"\n{step}: {{{key}: {tmp_path / 'base'}}}\n")
        axes = {"temperature": {"low": {}, "high": {step: {"temperature": 0.05}}}}
        grid = Grid.read(write_grid(options={}, steps=[step], axes=axes))
    open_results(grid, tmp_path, False).save(tmp_path)
    open_results(grid, tmp_path, False)
    with (tmp_path / file).open("a") as changed:
        changed.write(" \n")
    name = "scored/" if file == "scored/new.jsonl" else file
    with pytest.raises(ValueError, match=f"has results of another .*{name}: name another output_dir"):
        open_results(grid, tmp_path, False)


def test_what_runs_themselves_write_is_no_input(write_grid, tmp_path):
    cache = tmp_path / "cache"
    distill = {"teacher": "me/teacher", "teacher_cache": str(cache), "kd_losses": ["similarities"]}
    axes = {"temperature": {"low": {}, "high": {"distill": {"temperature": 0.05}}}}
    (tmp_path / "recipe.yaml").write_text((tmp_path / "recipe.yaml").read_text() + "\ndistill: {}\n")
    options = {"init": {"base": str(tmp_path / "base")}, "distill": distill}
    grid = Grid.read(write_grid(options=options, steps=["init", "distill"], axes=axes))
    for file in ("made_from.json", "vectors.npy"):
        cache.mkdir(exist_ok=True)
        (cache / file).write_text("{}")
        open_results(grid, tmp_path, False).save(tmp_path)


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
    grid = Grid.read(write_grid(steps=["stage1"], options={}, axes={"one": {"a": {}}}))
    before = grid.runs()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "\nlora_r: 4\n")
    assert grid.runs() == before
    results = Results({})
    Runner(grid, tmp_path / "out", results).run()
    assert results.failures(grid)["a, seed 1"] == f"{recipe} has changed since the grid began: run it again"
    recipe.write_text("datasets: [")
    Runner(grid, tmp_path / "out", results).run()
    assert "recipe.yaml cannot be read as YAML" in results.failures(grid)["a, seed 1"]


def test_what_other_code_goes_on_with_is_of_both(write_grid, tmp_path, monkeypatch):
    grid = Grid.read(write_grid(steps=["stage1"], options={}, axes={"one": {"a": {}}}))
    key = grid.runs()[0].last.key
    folders = {key: tmp_path / "out/runs" / key, f"{key}:scores": tmp_path / "out/scores" / key}
    left = {key: "checkpoint-2", f"{key}:scores": "results/model/revision/scored.json"}
    results = Results({}, code=dict.fromkeys(folders, "0123456789ab"))
    one = Runner(grid, tmp_path / "out", results)
    monkeypatch.setattr(one, "_make", lambda *given: None)
    with ThreadPoolExecutor(1) as pool:
        for job, folder in folders.items():
            (folder / left[job]).mkdir(parents=True)
            one._submit(pool, job, one._make)
            assert results.code[job] == ", ".join(sorted(("0123456789ab", code_digest())))
            shutil.rmtree(folder)
            one._submit(pool, job, one._make)
            assert results.code[job] == code_digest()


def test_runs_that_begin_alike_share_their_steps(write_grid, capsys):
    axes = {
        "pooling": {"mean": {"init": {"pooling_type": "mean"}}, "eos": {"init": {"pooling_type": "eos"}}},
        "temperature": {"low": {"stage2": {"temperature": 0.01}}, "high": {"stage2": {"temperature": 0.05}}},
    }
    steps = ["init", "stage1", "stage2"]
    grid = Grid.read(write_grid(axes=axes, steps=steps, seeds=[1, 2]))
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
    fixed = Grid.read(write_grid(axes=axes, steps=steps, seeds=[1, 2], options={"init": {"seed": 3}})).runs()
    assert len({run.last.chain[0].key for run in fixed}) == 2, "a pooling each: both seeds begin with the same weights"
    assert len({run.last.key for run in fixed}) == 8
    print_plan(grid, Runner(grid, Path("out"), taken))
    plan = capsys.readouterr().out
    assert "# eos, high, seed 2\npython train/init_checkpoint.py" in plan
    assert "| stage2 | 7 | 1.0 | 0.1 |" in plan and "| stage1 | 4 | ? | ? |" in plan
    assert "Still to run: at least 0.3 hours, 1 at a time" in plan
    lines = Runner(grid, Path("out"), taken).commands()["mean, low, seed 1"]
    assert "--temperature 0.01" in lines[2] and lines[3].startswith("python eval/run_mteb.py --model out/runs/stage2-")


def test_a_training_of_two_cells_is_measured_once(write_grid, tmp_path, monkeypatch):
    """The first seed's draws are those that all seeds of the second cell begin with."""
    axes = {"new weights": {"of each seed": {}, "drawn once": {"init": {"seed": 1}}}}
    file = write_grid(axes=axes, seeds=[1, 2], steps=["init", "stage1"])
    grid, measured = Grid.read(str(file)), []
    monkeypatch.setattr(Runner, "_make", lambda self, step, environment: True)
    monkeypatch.setattr(Runner, "_measure", lambda self, key, *rest: measured.append(key) or {"average": 1.0})
    results = open_results(grid, tmp_path, False)
    Runner(grid, tmp_path, results, min(2, os.cpu_count())).run()
    assert len(measured) == len({*measured}) == 3 and not results.missing(grid)
    monkeypatch.setattr(sys, "argv", ["ablate.py", str(file), "--output_dir", str(tmp_path), "--seeds", "1"])
    with pytest.raises(SystemExit, match="drawn once is the same run as of each seed"):
        main()


def test_a_set_that_was_trained_on_gives_no_zero_shot_score(write_grid, tmp_path, monkeypatch):
    """Left out of one stage, and read by the other."""

    def measure(model, tasks, folder, *options, **rest):
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"details": {"scored": {"training_data": mark}}}))
        return {"scored": 1.0, "average": 1.0}

    monkeypatch.setattr(runner, "score", measure)
    grid = Grid.read(write_grid())
    for mark in ("zero-shot", "-"):
        assert Runner(grid, tmp_path / mark, Results({}))._measure("stage2-0", ("scored",), {})["scored"] == 1.0
    mark = "seen"
    Runner(grid, tmp_path / "all", Results({}))._measure("stage2-0", (), {})
    with pytest.raises(ValueError, match="scored is measured as zero-shot, .* must name the set in every step"):
        Runner(grid, tmp_path / mark, Results({}))._measure("stage2-0", ("scored",), {})


def test_a_command_that_was_killed_is_told_from_one_with_an_error(write_grid, tmp_path):
    one = Runner(Grid.read(write_grid()), tmp_path, Results({}))
    log = tmp_path / "logs" / "stage1-0.log"
    log.parent.mkdir()
    log.write_text("Loading\n 12%|## | 12/100\n\n")
    killed = one._reason("stage1-0", subprocess.CalledProcessError(1, "stage1.py"))
    assert killed.startswith("ended with status 1 and no error, as where memory runs out; last said: 12%|## | 12/100 (")
    log.write_text("Loading\nValueError: x is 1\nand more\n")
    assert one._reason("stage1-0", subprocess.CalledProcessError(1, "stage1.py")) == f"ValueError: x is 1 ({log})"


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
        Grid.read(write_grid(axes=both)).train_on_gpu()
    sizes = {"latents": {"4": {"init": {"num_latents": 4}}, "8": {"init": {"num_latents": 8}}}}
    with pytest.raises(ValueError, match="--use_gpu is for trainings, and no run has one"):
        Grid.read(write_grid(axes=sizes, steps=["init"], options={})).train_on_gpu()


def test_a_report_of_a_grid_that_is_not_through(write_grid, tmp_path, monkeypatch, capsys):
    """Of what has been measured, with how much is missing; it runs nothing, also while the grid runs."""
    file = write_grid(seeds=[1, 2, 3])
    grid, out = Grid.read(str(file)), tmp_path / "out"
    command = ["ablate.py", str(file), "--output_dir", str(out), "--page", str(tmp_path / "PAGE.md"), "--report_only"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="out does not exist: run .* without --report_only"):
        main()
    assert not out.exists()
    results, runs = open_results(grid, out, False), grid.runs()
    results.failed = {runs[3].key: "ValueError: x", "stage1-0123456789": "ValueError: of another grid"}
    out.mkdir()
    results.save(out)
    with pytest.raises(SystemExit, match="out has no scores of .* with these options: give the --seeds"):
        main()
    assert not (tmp_path / "PAGE.md").exists()
    results.scores = {run.key: {"scored": 40.0, "average": 40.0} for run in runs[:3]}
    results.code = {run.key: "0123456789ab" for run in runs[:3]}
    results.save(out)
    before = (out / "grid.json").read_bytes()
    monkeypatch.setattr(provenance, "version", lambda name: "0.1")  # upgraded since
    with claimed(out, "ablate.py"), pytest.raises(SystemExit, match="1 runs failed"):
        main()
    page = (tmp_path / "PAGE.md").read_text()
    assert "| 40.00 ± 0.00 (2) |" in page and "0123456789ab" in page, "by whatever code"
    assert "Not measured yet: 2 of 6 runs." in page and "another grid" not in page
    assert f"torch {torch.__version__}, " in page and "torch 0.1" not in page, "what measured"
    assert f"Runs that failed:\n\n- {cell_name(runs[3].cell)}, seed {runs[3].seed}: ValueError: x\n" in page
    assert "--report_only" not in page, "the command makes all of it"
    assert (out / "grid.json").read_bytes() == before and (tmp_path / "ablations" / "grid.png").is_file()
    monkeypatch.setattr(sys, "argv", [*command, "--use_gpu"])
    with pytest.raises(SystemExit, match="has no scores"):
        main()  # those of trainings on GPUs, which a report does not need
    monkeypatch.setattr(sys, "argv", [*command, "--dry_run"])
    with pytest.raises(SystemExit):
        main()
    assert "not allowed with" in capsys.readouterr().err


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


def test_grids_that_write_one_page_at_a_time_keep_all_sections(tmp_path):
    page, names = tmp_path / "PAGE.md", {f"## grid {number}" for number in range(8)}
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: [put_section(page, name, f"{name}\n") for _ in range(10)], names))
    assert {line for line in page.read_text().splitlines() if line.startswith("## ")} == names
