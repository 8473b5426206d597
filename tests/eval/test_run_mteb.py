"""The whole command: resumed, split over processes, refused; mteb's own tasks through `datasets`; baselines."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mteb
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import BertConfig, BertModel

from nvembed import NVEmbedModel
from nvembed.eval import run_mteb
from nvembed.eval.models import clean, digest_model, load_model
from nvembed.eval.report import read_run, write_report
from nvembed.eval.results import category_averages, claim_folder, main_score
from nvembed.eval.run_mteb import MtebArguments, run
from nvembed.eval.tasks.lookup import select_tasks
from nvembed.texts_nvembed import format_instruction, tokenize


SCRIPT = Path(run_mteb.__file__)


def command(checkpoint, tasks, output_dir, *launcher):
    arguments = [SCRIPT, "--model", checkpoint, "--tasks", tasks, "--output_dir", output_dir, "--max_length", 64]
    return [sys.executable, *launcher, *map(str, arguments)]


@pytest.fixture
def arguments(checkpoint, data, tmp_path):
    def make(output_dir="out", **options):
        defaults = {"model": str(checkpoint), "tasks": [str(data / "tasks.yaml")], "max_length": 64}
        return MtebArguments(output_dir=str(tmp_path / output_dir), **(defaults | options))

    return make


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
    process = subprocess.Popen(
        command(checkpoint, data / "tasks.yaml", tmp_path / "killed"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while (
        not (finished := list((tmp_path / "killed").glob("results/*/*/reranking.json"))) and time.monotonic() < deadline
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
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
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = command(checkpoint, data / "tasks.yaml", tmp_path / "two", *launcher)
    done = subprocess.run(two, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("average of 7 tasks") == 1, "one process prints"
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["tasks"] == pytest.approx(run(arguments("one"))["tasks"], abs=1e-3)

    (tmp_path / "two" / "run.json").write_text('{"settings": {"model": "another"}, "tasks": {}}')
    failed = subprocess.run(two, capture_output=True, text=True, timeout=300)
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
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    failed = subprocess.run(launcher, capture_output=True, text=True, timeout=120)
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


def test_a_model_is_known_by_its_files(checkpoint, tmp_path):
    first = digest_model(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a card")
    assert digest_model(tmp_path / "copy") == first
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Normalize"}]  # the last without a folder, as often
    (tmp_path / "copy" / "modules.json").write_text(json.dumps(modules))
    before = digest_model(tmp_path / "copy")
    (tmp_path / "copy" / "1_Pooling").mkdir()
    (tmp_path / "copy" / "1_Pooling" / "config.json").write_text("{}")
    assert digest_model(tmp_path / "copy") != before
    (tmp_path / "copy" / "tokenizer_config.json").write_text("{}")
    assert digest_model(tmp_path / "copy") != first


# --- Scores


def test_only_the_subsets_asked_for_count():
    (task,) = select_tasks(["STS17"])
    parts = [{"hf_subset": subset, "main_score": score} for subset, score in (("en-en", 0.75), ("ko-ko", 0.25))]
    assert main_score(task, SimpleNamespace(scores={"test": parts})) == 0.75
    parts[0]["main_score"] = math.nan
    with pytest.raises(ValueError, match="STS17 has the score nan"):
        main_score(task, SimpleNamespace(scores={"test": parts}))


def test_categories_come_in_the_papers_order():
    types = {"a": "STS", "b": "Retrieval", "c": "STS", "d": "BitextMining"}
    averages = category_averages({"a": 0.2, "b": 0.5, "c": 0.4, "d": 1.0}, types)
    assert list(averages.items()) == [("Retrieval", 0.5), ("STS", pytest.approx(0.3)), ("BitextMining", 1.0)]


# --- mteb's own tasks


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Data set repositories of the layout and under the names that mteb expects; `datasets` takes a folder first."""
    scifact, banking = tmp_path / "mteb" / "scifact", tmp_path / "mteb" / "banking77"
    claims = [f"claim {i} of {letter}" for i, letter in enumerate("abc" * 4)]
    corpus = [{"_id": str(i), "title": f"{letter} study", "text": f"paper {i}"} for i, letter in enumerate("abc" * 7)]
    tables = {
        scifact / "corpus.jsonl": corpus,
        scifact / "queries.jsonl": [{"_id": str(100 + i), "text": claim} for i, claim in enumerate(claims)],
        scifact / "qrels" / "test.jsonl": [
            {"query-id": str(100 + i), "corpus-id": str((5 * i) % 21), "score": 1.0} for i in range(10)
        ],
    }
    for split, size in (("train", 40), ("test", 20)):
        rows = [
            {"text": f"{'abcd'[i % 4]} {split} {i}", "label": i % 4, "label_text": "abcd"[i % 4]} for i in range(size)
        ]
        tables[banking / f"{split}.jsonl"] = rows
    for path, rows in tables.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (scifact / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: [{split: test, path: qrels/test.jsonl}]\n"
        "- config_name: corpus\n  data_files: [{split: corpus, path: corpus.jsonl}]\n"
        "- config_name: queries\n  data_files: [{split: queries, path: queries.jsonl}]\n---\n"
    )
    (banking / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: train.jsonl}\n"
        "  - {split: test, path: test.jsonl}\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    return corpus, claims


def test_tasks_of_mteb_through_datasets(hub, arguments, checkpoint, caplog):
    summary = run(arguments(tasks=["SciFact", "Banking77Classification"]))
    assert summary["details"]["SciFact"]["dataset"] == "mteb/scifact"
    assert summary["details"]["Banking77Classification"]["type"] == "Classification"

    corpus, claims = hub
    model = NVEmbedModel.from_pretrained(checkpoint)
    instruction = "Instruct: Given a scientific claim, retrieve documents that support or refute the claim\nQuery: "
    queries = model.encode(claims[:10], instruction, 64)
    documents = model.encode([f"{row['title']} {row['text']}" for row in corpus], "", 64)
    total = 0.0
    for i, similarity in enumerate(queries @ documents.T):
        rank = int((similarity > similarity[(5 * i) % 21]).sum())
        total += 1 / math.log2(rank + 2) if rank < 10 else 0
    assert summary["tasks"]["SciFact"] == pytest.approx(round(total / 10, 5), abs=1e-6)
    assert 0.2 < summary["tasks"]["Banking77Classification"] <= 1


def test_a_changed_copy_of_the_data_is_seen(hub, arguments, tmp_path):
    """`datasets` knows a folder by its name; its cache would give the old rows."""
    arguments = partial(arguments, tasks=["SciFact"])
    first = run(arguments("first"))
    file = tmp_path / "mteb" / "scifact" / "qrels" / "test.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:1]))
    with pytest.raises(ValueError, match="holds SciFact with data of the folder '.*', this run has"):
        run(arguments("first"))
    second = run(arguments("second"))
    assert second["tasks"] != first["tasks"]
    revisions = [summary["details"]["SciFact"]["dataset_revision"] for summary in (first, second)]
    (task,) = select_tasks(["SciFact"])
    assert len({*revisions, task.metadata.revision}) == 3, "neither is the Hub's"


@pytest.mark.slow
def test_an_aggregated_task_is_the_mean_of_its_parts(hub, arguments, tmp_path):
    """CQADupstack: twelve forums, each a task with its own result, one score of the paper's 56."""
    (task,) = select_tasks(["CQADupstackRetrieval"])
    for i, part in enumerate(task.metadata.tasks):
        folder = tmp_path / part.metadata.dataset["path"]
        shutil.copytree(tmp_path / "mteb" / "scifact", folder)
        qrels = (folder / "qrels" / "test.jsonl").read_text().splitlines()
        (folder / "qrels" / "test.jsonl").write_text("\n".join(qrels[i % 9 :]))
    summary = run(arguments(tasks=["CQADupstackRetrieval"], max_length=512))
    parts = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("results/*/*/CQADupstack*.json")]
    scores = {part["task_name"]: part["scores"]["test"][0]["main_score"] for part in parts}
    mean = scores.pop("CQADupstackRetrieval")
    assert len(scores) == 12
    assert len(set(scores.values())) > 3
    assert summary["tasks"] == {"CQADupstackRetrieval": pytest.approx(sum(scores.values()) / 12, abs=1e-6)}
    assert summary["average"] == pytest.approx(mean)
    assert run(arguments(tasks=["CQADupstackRetrieval"], max_length=512)) == summary


def test_a_hub_that_cannot_be_reached(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        r"SciFact \(data set 'mteb/scifact', revision .*\): the data is not in the cache and failed to load from https"
    )
    with pytest.raises(
        ConnectionError, match=words + r".*copy the data set's repository to a folder.*What is done is k"
    ):
        run(arguments(tasks=["SciFact"]))


def test_a_task_whose_data_is_wrong_does_not_stop_the_others(hub, arguments, tmp_path):
    shutil.rmtree(tmp_path / "mteb" / "scifact" / "qrels")
    with pytest.raises(ValueError, match=r"not measured, so there is no average: 1 of 2 tasks\n  SciFact: "):
        run(arguments(tasks=["SciFact", "Banking77Classification"]))
    assert len(list((tmp_path / "out").glob("results/*/*/Banking77Classification.json"))) == 1
    assert not (tmp_path / "out" / "summary.json").exists()


# --- Models


@pytest.fixture(scope="module")
def baseline(decoder_dir, tmp_path_factory):
    """A sentence-transformers model with prompts of its own."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("baseline")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=400, max_position_embeddings=128, **shape)).save_pretrained(folder / "bert")
    for file in decoder_dir.glob("tokenizer*"):
        shutil.copy(file, folder / "bert")
    tokenizer = json.loads((folder / "bert" / "tokenizer_config.json").read_text())
    (folder / "bert" / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"pad_token": "</s>"}))
    model = sentence_transformers.SentenceTransformer(str(folder / "bert"), device="cpu")
    model.prompts = {"query": "find: ", "document": "", "STS": "like: "}
    model.save_pretrained(str(folder / "model"))
    return folder / "model"


@pytest.mark.slow
def test_a_baseline_keeps_its_own_prompts(baseline, arguments, data):
    from sentence_transformers import SentenceTransformer

    summary = run(arguments(model=str(baseline)))
    model = SentenceTransformer(str(baseline), device="cpu")
    rows = [json.loads(line) for line in (data / "sts" / "test.jsonl").read_text().splitlines()]
    first, second = (model.encode([r[side] for r in rows], prompt="like: ") for side in ("sentence1", "sentence2"))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    expected = spearmanr((first * second).sum(1) / norms, [r["score"] for r in rows])[0]
    assert summary["tasks"]["sts"] == pytest.approx(expected, abs=1e-6)
    instructed = run(arguments("instructed", model=str(baseline), instruct=True))
    assert instructed["tasks"]["sts"] != pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_baselines_own_similarity(baseline, arguments, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(baseline), device="cpu", similarity_fn_name="dot")
    model.save_pretrained(str(tmp_path / "dot"))
    tasks = select_tasks(arguments().tasks)
    expected = mteb.evaluate(model, [t for t in tasks if t.metadata.name == "retrieval"], cache=None)
    by_dot, by_cosine = (
        run(arguments(f"out-{m.name}", model=str(m)))["tasks"]["retrieval"] for m in (tmp_path / "dot", baseline)
    )
    assert by_dot == expected[0].scores["test"][0]["main_score"] != by_cosine
    model.similarity_fn_name = "euclidean"
    model.save_pretrained(str(tmp_path / "euclidean"))
    with pytest.raises(ValueError, match="compares by 'euclidean'; cosine and dot can be measured here"):
        load_model(str(tmp_path / "euclidean"))


def test_a_baseline_is_cut_at_max_length(baseline):
    long = ["word " * 100]
    short, whole = (load_model(str(baseline), max_length=length).embed(long, "") for length in (8, 512))
    assert np.abs(short - whole).max() > 1e-3


def test_no_model(tmp_path):
    with pytest.raises(ValueError, match="'no/such' is neither a local folder nor a model found at https"):
        load_model("no/such")
    with pytest.raises(ValueError, match="holds neither config.json nor modules.json"):
        load_model(str(tmp_path))
    for path in (str(tmp_path / "none"), "./none", "tests/none"):
        with pytest.raises(ValueError, match="none': there is no such folder"):
            load_model(path)


def test_embeddings_that_are_not_finite_have_no_score(checkpoint, arguments, tmp_path):
    model = NVEmbedModel.from_pretrained(checkpoint)
    model.embedding_model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "diverged")
    with pytest.raises(ValueError, match="embeddings hold NaN or infinity; if it was trained, lower"):
        run(arguments(model=str(tmp_path / "diverged")))


def test_texts_that_encode_refuses_are_mended(checkpoint):
    texts = ["a\0b", "half \ud83d", "whole \U0001f600"]
    assert [clean(text) for text in texts] == ["a b", "half �", "whole \U0001f600"]
    load_model(str(checkpoint)).embed(texts, "")


@pytest.mark.slow
def test_errors_are_one_line_on_the_command_line(checkpoint, tmp_path):
    failed = subprocess.run(command(checkpoint, "SciFcat", tmp_path / "out"), capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("run_mteb: --tasks 'SciFcat' is neither")
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("field", "value"), [("max_length", 0), ("batch_tokens", -1)])
def test_bad_numbers(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        MtebArguments("m", "o", **{field: value})


def test_mtebs_version_is_in_the_summary(arguments, data):
    (data / "tasks.yaml").write_text("tasks: [{type: STS, path: sts}]")
    assert run(arguments())["mteb"] == mteb.__version__


def test_no_more_tokens_than_the_decoder_has_positions(checkpoint, tmp_path, sentences, caplog):
    model = NVEmbedModel.from_pretrained(checkpoint)
    model.config.text_config.max_position_embeddings = 16
    model.save_pretrained(tmp_path / "few")
    loaded = load_model(str(tmp_path / "few"), max_length=100)
    assert loaded.max_length == 16, "so results say"
    assert "texts are cut at the decoder's 16 positions" in caplog.text
    expected = NVEmbedModel.from_pretrained(checkpoint).encode([" ".join(sentences)], max_length=16).numpy()
    assert loaded.embed([" ".join(sentences)], "") == pytest.approx(expected, abs=1e-6)
