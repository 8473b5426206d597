"""Builds the same data on this machine and on a local Ray cluster of two workers, and compares them; `make test-ray`.

Ray is installed into an environment of its own, .venv-ray, that sees the packages of .venv.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from tests.triplets import write_jsonl


ROOT = Path(__file__).parents[1]
RAY = "ray==2.60.0"
OPTIONS = "mem_per_cpu_gb: 1\n"  # what a task reserves


def ray_python() -> Path:
    """The interpreter of .venv-ray, which is made if it does not exist."""
    folder = ROOT / ".venv-ray"
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "packages-of-venv.pth").write_text(
            f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n"
        )
    subprocess.run([python, "-m", "pip", "install", "--quiet", RAY], check=True)
    return python


def write_data(folder: Path) -> Path:
    """A recipe over small data of several shards."""
    write_jsonl(
        folder / "corpus.jsonl",
        [{"query": f"word{i} of topic{i % 7}", "positive": f"text of topic{i % 7} with word{i}"} for i in range(200)],
    )
    write_jsonl(folder / "classes" / "train.jsonl", [{"text": f"text {i}", "label": f"l{i % 5}"} for i in range(100)])
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "datasets: [{path: corpus.jsonl}, {path: classes}]\ninstruction: Find it\nshard_rows: 20\nnum_negatives: 3\n"
    )
    (folder / "options.yaml").write_text(OPTIONS)
    return recipe


def main() -> None:
    python = ray_python()
    with tempfile.TemporaryDirectory(prefix="nvembed-ray-") as name:
        folder = Path(name)
        recipe = write_data(folder)
        command = [python, "-m", "nvembed.train.build_data", "--recipe", recipe]
        subprocess.run([*command, "--output_dir", folder / "here"], check=True)
        start = "import ray; ray.init(num_cpus=2)"
        script = (
            f"{start}; import sys; sys.argv[1:] = {[str(part) for part in command[3:]]!r} + "
            f"['--output_dir', {str(folder / 'ray')!r}, '--executor', 'ray', '--tasks', '4', '--workers', '2', "
            f"'--executor_options', {str(folder / 'options.yaml')!r}]; from nvembed.train import build_data; "
            "build_data.main()"
        )
        subprocess.run([python, "-c", script], check=True, cwd=ROOT)
        here, there = (json.loads((folder / place / "manifest.json").read_text()) for place in ("here", "ray"))
        if here != there:
            sys.exit(f"on Ray, the build differs: {here} and {there}")
        files = sum(len(one["files"]) for one in here["sets"].values())
        print(f"the same {files} files, byte for byte, on this machine and on Ray with two workers ({RAY})")


if __name__ == "__main__":
    main()
