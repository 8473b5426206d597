"""The package as pip installs it, away from the clone."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


def test_no_module_hides_another():
    """A script's own folder comes first on its path, so `import report` in a dependency would find ours."""
    files = [path for name in ("train", "eval") for path in (ROOT / name).rglob("*.py")]
    ours = {path.parent.name if path.name == "__init__.py" else path.stem for path in files}
    others = sys.stdlib_module_names | packages_distributions().keys()
    assert not ours & others


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """The environment of a process that finds the built wheel before the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools leaves a `build/` behind, and packs what it finds in one
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "tests", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = folder.glob("nvembed-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return os.environ | {"PYTHONPATH": str(folder / "site")}


def run(installed, cwd, *command) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_an_installed_package_trains_and_measures(installed, tmp_path, checkpoint, sentences):
    """Recipes by name, scripts as modules; data, model and output folder are the user's."""
    code = "import nvembed, pathlib; print(pathlib.Path(nvembed.__file__).parent)"
    assert run(installed, tmp_path, "-c", code).strip() == f"{installed['PYTHONPATH']}/nvembed"
    rows = [{"query": text[: len(text) // 2], "positive": text[len(text) // 2 :]} for text in sentences]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        installed, tmp_path, "-m", "accelerate.commands.launch", "--num_processes=1", "-m", "nvembed.train.stage1",
        "--config", "smollm2", f"--model_name_or_path={checkpoint}", "--datasets=pairs.jsonl", "--output_dir=trained",
        "--instruction=Complete", "--bf16=false", "--dtype=float32", "--batch_size=4", "--max_steps=1",
        "--disable_tqdm=true",
    )  # fmt: skip
    (tmp_path / "similar").mkdir()
    pairs = [json.dumps({"sentence1": r["query"], "sentence2": r["positive"], "score": i}) for i, r in enumerate(rows)]
    (tmp_path / "similar" / "test.jsonl").write_text("\n".join(pairs))
    (tmp_path / "tasks.yaml").write_text("tasks: [{type: STS, path: similar, instruction: Complete}]")
    arguments = ("--model", "trained", "--tasks", "tasks.yaml", "--output_dir", "scores")
    assert "average of 1 tasks" in run(installed, tmp_path, "-m", "nvembed.eval.run_mteb", *arguments)
