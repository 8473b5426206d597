"""The whole command: one run, resumed, split over processes, refused."""

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mteb
import pytest
import torch

from nvembed import NVEmbedModel
from nvembed.eval import run_mteb
from nvembed.eval.report import read_run, write_report
from nvembed.eval.results import claim_folder, keep_texts
from nvembed.eval.run_mteb import MtebArguments, run
from nvembed.texts_nvembed import format_instruction, tokenize
from tests import preloaded
from tests.train.test_processes import TORCHRUN


SCRIPT = Path(run_mteb.__file__)


def command(checkpoint, tasks, output_dir):
    return [SCRIPT, "--model", checkpoint, "--tasks", tasks, "--output_dir", output_dir, "--max_length", 64]


@pytest.fixture
def embedded(monkeypatch):
    """The texts that NVEmbedModel embeds."""
    texts, encode = [], NVEmbedModel.encode

    def counted(self, prompts, *args, **kwargs):
        texts.extend(prompts)
        return encode(self, prompts, *args, **kwargs)

    monkeypatch.setattr(NVEmbedModel, "encode", counted)
    return texts


# --- One run


def test_summary(arguments, tmp_path, capsys):
    summary = run(arguments())
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    kinds = {"retrieval": "Retrieval", "reranking": "Reranking", "clustering": "Clustering", "sets": "Clustering"}
    kinds |= {"pairs": "PairClassification", "classification": "Classification", "sts": "STS"}
    assert {task: detail["type"] for task, detail in summary["details"].items()} == kinds
    scores = summary["tasks"]
    assert list(summary["categories"]) == [
        "Retrieval", "Reranking", "Clustering", "PairClassification", "Classification", "STS",
    ]  # fmt: skip
    assert summary["categories"]["Clustering"] == pytest.approx((scores["clustering"] + scores["sets"]) / 2)
    assert summary["average"] == pytest.approx(sum(scores.values()) / 7), "over tasks, not over categories"
    printed = capsys.readouterr().out
    assert f"average of 7 tasks{'':>48}{100 * summary['average']:.2f}".split() == printed.splitlines()[-1].split()[:-1]


def test_the_summary_says_how_texts_crowd_and_how_many_are_cut(arguments, checkpoint, data, tmp_path, capsys):
    """Against encode and the tokenizer: a text beyond max_length keeps its beginning and its end token."""
    model = NVEmbedModel.from_pretrained(checkpoint)
    rows = [json.loads(line) for line in (data / "sts" / "test.jsonl").read_text().splitlines()]
    rows[0]["sentence1"] = "one two three four " * 40
    (data / "sts" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "one.yaml").write_text("tasks: [{type: STS, path: sts, instruction: Find it}]")
    detail = run(arguments(tasks=[str(data / "one.yaml")], max_length=32))["details"]["sts"]
    firsts, seconds = ({row[column] for row in rows} for column in ("sentence1", "sentence2"))
    prefix = format_instruction("Find it")
    cut = [len(model.tokenizer(prefix + text).input_ids) > 32 for column in (firsts, seconds) for text in column]
    assert (detail["texts"], detail["cut"]) == (len(cut), sum(cut)) and sum(cut) > 0
    assert f"sts: {sum(cut)} of {len(cut)} texts are cut at max_length" in capsys.readouterr().out
    unit = torch.stack([model.encode([text], prefix, max_length=32)[0] for text in firsts]).double()
    cosines = unit @ unit.T
    pairs = len(unit) * (len(unit) - 1)
    assert detail["mean_cosine"] == pytest.approx((cosines.sum() - cosines.trace()).item() / pairs, abs=1e-3)
    assert 1 <= detail["effective_rank"] <= len(unit)
    (tokens,) = tokenize(model.tokenizer, model.config, [rows[0]["sentence1"]], [prefix], 32)
    whole = model.tokenizer(prefix + rows[0]["sentence1"]).input_ids
    assert tokens.input_ids == [*whole[:31], whole[-1]]
    again = run(arguments(tasks=[str(data / "one.yaml")], max_length=32))
    assert again["details"]["sts"] == detail, "kept with the results"
    write_report([read_run(str(tmp_path / "out"))], str(tmp_path / "report"))
    assert (
        f"| sts | {detail['mean_cosine']:g} | {detail['effective_rank']:g} |"
        in (tmp_path / "report" / "report.md").read_text()
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(arguments, checkpoint, data, tmp_path, embedded, capsys):
    whole = run(arguments("whole"))
    process = preloaded.start(*command(checkpoint, data / "tasks.yaml", tmp_path / "killed"))
    deadline = time.monotonic() + 120
    while (
        not (finished := list((tmp_path / "killed").glob("results/*/*/reranking.json"))) and time.monotonic() < deadline
    ):
        time.sleep(0.002)
    process.kill()
    process.join()
    assert finished, "it was killed too early"
    assert not (tmp_path / "killed" / "summary.json").exists(), "it was killed too late"
    before = {path: path.read_bytes() for path in (tmp_path / "killed").glob("results/*/*/*[!a].json")}
    embedded.clear()
    assert run(arguments("killed")) == whole
    assert (tmp_path / "killed" / "summary.json").read_bytes() == (tmp_path / "whole" / "summary.json").read_bytes()
    assert "a query 0" not in embedded, "retrieval was done, and is not done again"
    assert embedded
    assert all(path.read_bytes() == content for path, content in before.items() if path.name == "retrieval.json")

    embedded.clear()
    assert run(arguments("killed")) == whole
    assert embedded == [], "a finished run embeds nothing"
    assert "7 of 7 tasks were measured before" in capsys.readouterr().out


def test_a_result_cut_off_by_a_kill_is_measured_again(arguments, tmp_path, caplog):
    whole = run(arguments())
    (result,) = (tmp_path / "out").glob("results/*/*/sts.json")
    result.write_text(result.read_text()[:100])
    assert run(arguments()) == whole
    assert "sts.json was cut off when it was written" in caplog.text


@pytest.mark.slow
def test_two_processes_measure_as_one(arguments, checkpoint, data, tmp_path):
    two = command(checkpoint, data / "tasks.yaml", tmp_path / "two")
    done = subprocess.run(
        [sys.executable, "-m", *TORCHRUN, *map(str, two)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("average of 7 tasks") == 1, "one process prints"
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["tasks"] == pytest.approx(run(arguments("one"))["tasks"], abs=1e-3)

    (tmp_path / "two" / "run.json").write_text('{"settings": {"model": "another"}, "tasks": {}}')
    failed = preloaded.run(*two, processes=2)
    assert failed.returncode != 0, "and an error ends both processes"
    assert "holds results with" in failed.stderr


@pytest.mark.slow
def test_an_error_of_another_process_ends_the_run(tmp_path):
    """A process that fails answers with its error; the main one would wait for its share for ever."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import torch.distributed as dist\n"
        "from nvembed.eval.processes import split_over_processes\n"
        "dist.init_process_group('gloo')\n"
        "def embed(texts, prefix):\n"
        "    raise MemoryError(f'rank {dist.get_rank()}: {texts}')\n"
        "with split_over_processes(embed) as shared:\n"
        "    if shared is not None:\n"
        "        shared(['long text', 'short', ''], 'p')\n"
    )
    failed = preloaded.run(script, processes=2, timeout=120)
    assert failed.returncode != 0
    assert "process 0 of 2 failed: MemoryError(\"rank 0: ['long text', '']\")" in failed.stderr


# --- What a folder holds


def test_another_revision_setting_or_instruction_is_refused(arguments, checkpoint, data, tmp_path):
    run(arguments())
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    other = tmp_path / checkpoint.parent.name / checkpoint.name  # the same last two parts: the same name
    shutil.copytree(checkpoint, other)
    NVEmbedModel.from_pretrained(checkpoint).double().float().save_pretrained(other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_seq_length": 9}))
    with pytest.raises(
        ValueError, match="holds results with revision '.*', this run has '.*'; name another --output_d"
    ):
        run(arguments(model=str(other)))
    with pytest.raises(ValueError, match="holds results with max_length 64, this run has 32"):
        run(arguments(max_length=32))
    text = (data / "tasks.yaml").read_text()
    (data / "tasks.yaml").write_text(text.replace("Do sts", "Be sts"))
    with pytest.raises(ValueError, match="holds sts with instruction 'Do sts', this run has 'Be sts'"):
        run(arguments())
    for instruction in ("Do sts", "Be sts"):  # nothing was measured with the first one
        claim_folder(str(tmp_path / "new"), {}, {"sts": {"instruction": instruction}})
    known = json.loads((tmp_path / "new" / "run.json").read_text())["tasks"]
    assert known == {"sts": {"instruction": "Be sts"}}
    (data / "tasks.yaml").write_text(text)
    rows = (data / "sts" / "test.jsonl").read_text().splitlines()
    (data / "sts" / "test.jsonl").write_text("\n".join(rows[1:]))
    with pytest.raises(ValueError, match="sts.json was measured on revision .* of the data of sts, which is now"):
        run(arguments())
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")} == before, "nothing was changed"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds files that are not of an evaluation"):
        claim_folder(str(tmp_path), {"model": "m"}, {})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="run.json does not say what was measured"):
        claim_folder(str(tmp_path / "run"), {"model": "m"}, {})
    with pytest.raises(ValueError, match="thesis.tex is a file; name a folder"):
        claim_folder(str(tmp_path / "thesis.tex"), {"model": "m"}, {})


def test_processes_that_measure_other_tasks_keep_each_others(tmp_path):
    names = [f"task {number}" for number in range(8)]

    def measure(name):
        for _ in range(5):
            folder = claim_folder(str(tmp_path / "out"), {"model": "m"}, {name: {"instruction": name}})
            keep_texts(folder, {name: {"texts": 1}})

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(measure, names))
    assert sorted(json.loads((tmp_path / "out" / "run.json").read_text())["tasks"]) == names
    assert sorted(json.loads((tmp_path / "out" / "texts.json").read_text())) == names


@pytest.mark.slow
def test_errors_are_one_line_on_the_command_line(checkpoint, tmp_path):
    failed = preloaded.run(*command(checkpoint, "SciFcat", tmp_path / "out"))
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("run_mteb: --tasks 'SciFcat' is neither")
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("field", "value"), [("max_length", 0), ("batch_tokens", -1)])
def test_bad_numbers(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        MtebArguments("m", "o", **{field: value})


def test_revisions_of_what_has_none_are_refused(checkpoint):
    with pytest.raises(ValueError, match="query_revision is v2 and there is no query_model"):
        MtebArguments("m", "o", query_revision="v2")
    with pytest.raises(ValueError, match="revision 'v2' is asked for of .*, which is a folder and has none"):
        MtebArguments(str(checkpoint), "o", revision="v2").load()


def test_mtebs_version_is_in_the_summary(arguments, data):
    (data / "tasks.yaml").write_text("tasks: [{type: STS, path: sts}]")
    assert run(arguments())["mteb"] == mteb.__version__
