"""The pages tell the truth: commands run as written, links lead somewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
RESULTS = sorted(path for name in ("train", "eval") for path in (ROOT / name).rglob("*.md"))  # what was measured
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

# Commands that no test runs as written, by their beginning, and why.
NOT_RUN = {
    "git clone": "the address is the reader's",
    "make": "a target; CI runs lint and test",
    "pre-commit install": "needs pre-commit, which is optional",
    ".venv/bin/python train/init_checkpoint.py --from_released nvidia": "16 GB; tests/train/test_checkpoints.py",
    ".venv/bin/python train/build_data.py --recipe paper-data": "data from the Hub; tests/train/data/test_build.py",
    "pip install": "a package that is not published yet, and vLLM",
    "vllm serve": "vLLM's own environment; `make test-vllm`",
    ".venv/bin/python train/export.py": "a model with mean pooling; tests/train/test_export.py",
    ".venv/bin/python train/init_checkpoint.py --base mistralai": "14 GB; test_init_checkpoint.py",
    ".venv/bin/accelerate launch --num_processes 8 train/": "8 GPUs; tests/train/test_processes.py: two CPU processes",
    ".venv/bin/accelerate launch --num_processes 8 eval/": "8 GPUs; tests/eval/test_run_mteb.py: two CPU processes",
    '.venv/bin/python eval/run_mteb.py --model runs/mine --tasks "MTEB': "data from the Hub, hours",
    ".venv/bin/python eval/run_mteb.py --model nvidia": "16 GB and data from the Hub",
    ".venv/bin/python eval/speed/encode.py": "minutes; tests/eval/test_speed.py: small sizes",
    ".venv/bin/python train/compress/prune.py --config query-encoder": "a trained checkpoint and ../shared/data",
    ".venv/bin/accelerate launch --num_processes 1 --num_cpu_threads_per_process 2 train/distill.py --config": "data",
    ".venv/bin/python eval/run_mteb.py --model runs/all-MiniLM": "likewise; tests/eval/test_query_model.py",
    ".venv/bin/python train/data/hold_out.py": "../shared/data; tests/train/data/test_hold_out.py",
    ".venv/bin/python eval/ablate.py poolings": "the quickstart's base and ../shared/data; tests/eval/test_ablate.py",
    "accelerate launch -m nvembed.train.stage1": "tests/test_package.py runs it with small sizes",
    ".venv/bin/python train/data/synthesize.py": "an endpoint; tests/train/data/test_synthesize.py has one of its own",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Each command of a page's shell blocks, on one line and without its comment."""
    text = "".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines())
    return [re.sub(r"\s+", " ", line) for line in lines if line]


def is_run(command: str) -> bool:
    return not any(command.startswith(beginning) for beginning in NOT_RUN)


def test_the_list_of_what_is_not_run_is_up_to_date():
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) > 10
    for beginning in NOT_RUN:
        assert any(command.startswith(beginning) for command in found), beginning


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert anchor in slugs, target


@pytest.fixture(scope="module")
def clone(tmp_path_factory, checkpoint, sentences) -> Path:
    """A clone after `make quickstart`, with a user's data: the folders that the pages name."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("train", "eval"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
    (folder / "runs" / "quickstart").mkdir(parents=True)
    shutil.copytree(checkpoint, folder / "runs" / "quickstart" / "checkpoint")
    rows = [{"query": f"{text[: len(text) // 2]} {i}", "positive": text} for i, text in enumerate(2 * sentences)]
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pairs").mkdir()
    pairs = [  # other texts: data.md keeps what is tested out of the training data
        {"sentence1": f"Why {row['query']}", "sentence2": f"So {row['positive']}", "score": i}
        for i, row in enumerate(rows)
    ]
    (folder / "pairs" / "test.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    documents = [{"_id": str(i), "text": row["positive"]} for i, row in enumerate(rows)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    labelled = [{"text": row["query"], "label": ("odd", "even")[i % 2]} for i, row in enumerate(rows)]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    (folder / "my-data.yaml").write_text(
        next(text for text in blocks(ROOT / "docs" / "data.md", "yaml") if "teacher" in text)
    )
    ladder = next(text for text in blocks(ROOT / "docs" / "compression.md", "yaml") if "ladder:" in text)
    (folder / "my-ladder.yaml").write_text(ladder)
    (folder / "my-tasks.yaml").write_text("tasks: [{type: STS, path: pairs, instruction: Retrieve similar text}]")
    return folder


@pytest.mark.slow
def test_commands_run_as_written(clone):
    """In the order of the pages, each once. The second run that the report shows is a copy of the first."""
    done = []
    for page in PAGES:
        for command in filter(is_run, commands(page)):
            if command in done:
                continue
            if "eval/report.py" in command and not (clone / "runs" / "eval" / "nv-embed-v2").exists():
                shutil.copytree(clone / "runs" / "eval" / "mine", clone / "runs" / "eval" / "nv-embed-v2")
            result = subprocess.run(command, shell=True, cwd=clone, capture_output=True, text=True)
            assert result.returncode == 0, f"{page.name}: {command}\n{result.stderr[-3000:]}"
            done.append(command)
    assert (clone / "runs" / "mine" / "config.json").is_file()
    assert (clone / "mined.jsonl").is_file()
    assert (clone / "runs" / "data" / "manifest.json").is_file()
    assert (clone / "runs" / "index.faiss").is_file()
    assert (clone / "runs" / "report" / "report.md").is_file()


@pytest.mark.slow
def test_the_readmes_python_runs_as_written(clone):
    """Each block that needs no released weights, in a process of its own without nvembed."""
    found = [block for block in blocks(ROOT / "README.md", "python") if "nvidia/" not in block]
    assert len(found) == 2
    for block in found:
        command = [sys.executable, "-c", f"import sys; sys.modules['nvembed'] = None\n{block}"]
        result = subprocess.run(command, cwd=clone, capture_output=True, text=True, env=os.environ)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "tensor([[" in result.stdout
