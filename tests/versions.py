"""Runs the golden and remote-code tests in a throwaway environment for each supported version; `make test-versions`.

    .venv/bin/python tests/versions.py 5.23.0   # one transformers alone

The checkpoint that every environment loads beside the golden one was converted by the Python that runs this script.
An environment takes 1 to 8 GB while it lives: on Linux, PyPI's torch may come with CUDA.
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from test_rope import LONG_TEXTS, ROPES
from torch import save as torch_save
from transformers.utils.logging import tqdm

from nvembed import NVEmbedModel
from nvembed.train.released import convert_released


ROOT = Path(__file__).parents[1]
# transformers, torch, sentence-transformers: from the oldest supported to the newest tried.
VERSIONS = [
    ("4.51.3", "2.6.0", "5.1.2"),
    ("4.57.6", "2.13.0", "5.7.0"),
    ("5.0.0", "2.13.0", "5.7.0"),
    ("5.17.0", "2.13.0", "6.2.0"),
    ("5.23.0", "2.13.0", "6.2.0"),
]


def run_tests(transformers: str, torch: str, sentence_transformers: str, checkpoints: Path) -> str:
    """The last line of pytest, or of the installation that failed."""
    with tempfile.TemporaryDirectory(prefix="nvembed-versions-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        packages = [f"transformers=={transformers}", f"torch=={torch}"]
        packages += [f"sentence-transformers=={sentence_transformers}", "datasets", "pytest"]
        done = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
        if done.returncode != 0:
            return f"not installed: {done.stderr.strip().splitlines()[-1]}"
        next(Path(folder).glob("lib/python*/site-packages")).joinpath("nvembed").symlink_to(ROOT)
        tests = ["tests/test_golden.py", "tests/test_rope.py", "tests/test_sentence_transformers.py"]
        tests += ["tests/test_families.py", "-k", "golden or rope or families"]
        done = subprocess.run(
            [python, "-m", "pytest", "-p", "no:cacheprovider", *tests],
            cwd=ROOT,
            env=os.environ | {"NVEMBED_SAVED_ELSEWHERE": str(checkpoints)},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            print(done.stdout, done.stderr, file=sys.stderr)
        return re.sub(r", \d+ deselected| in .*", "", done.stdout.strip().splitlines()[-1])


def save_with_scaled_ropes(source: str, folder: Path) -> None:
    """The same weights with each kind of scaled rope, and what they embed here."""
    for name, rope in ROPES.items():
        model = NVEmbedModel.from_pretrained(source)
        model.config.text_config.rope_parameters = rope
        model.save_pretrained(folder / name)
        torch_save(model.encode(LONG_TEXTS), folder / name / "expected.pt")


def main() -> None:
    golden = ROOT.parent / "shared" / "golden" / "checkpoint"
    if not golden.is_dir():
        sys.exit(f"{golden} is absent; these tests compare with it")
    rows, asked = [], sys.argv[1:]
    if unknown := {*asked} - {versions[0] for versions in VERSIONS}:
        sys.exit(f"there is no environment of transformers {min(unknown)}: {', '.join(v[0] for v in VERSIONS)}")
    with tempfile.TemporaryDirectory() as folder:
        convert_released(str(golden), str(Path(folder, "converted")))
        save_with_scaled_ropes(str(golden), Path(folder))
        chosen = [versions for versions in VERSIONS if not asked or versions[0] in asked]
        for versions in tqdm(chosen, unit="environment"):
            rows.append((*versions, run_tests(*versions, Path(folder))))
    print("| transformers | torch | sentence-transformers | tests |\n|---|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    sys.exit(any("passed" not in row[-1] or "failed" in row[-1] for row in rows))


if __name__ == "__main__":
    main()
