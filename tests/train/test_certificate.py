"""What a checkpoint says it was trained on, and what that makes of its scores."""

import json
from types import SimpleNamespace

import mteb
import pytest
from huggingface_hub import ModelCard

from nvembed.eval.files import sha256
from nvembed.eval.report import read_run, write_report
from nvembed.eval.training_data import FILE, is_seen, read_training_data, training_datasets
from nvembed.train.card import evaluation_table, write_card
from nvembed.train.certificate import certify, find_build, mteb_names, untrained, write_certificate
from nvembed.train.data.prepared import provenance
from nvembed.train.data.sets import as_source
from nvembed.train.data.source import DatasetSource
from tests.train.test_card import make_run
from tests.triplets import write_jsonl


def local_task(name):
    return SimpleNamespace(metadata=SimpleNamespace(name=name, main_score="ndcg_at_10"))


@pytest.fixture
def certificate(tmp_path):
    """Two stages: a set of the paper from the Hub, then one of one's own that `build_data.py` wrote."""
    built = tmp_path / "data" / "own"
    write_jsonl(built / "train.jsonl", [{"query": "q", "positive": "p", "negatives": ["n"]}])
    one = {
        "source": {"path": "/home/ann/raw.jsonl", "mteb": ["STS12"], "split": "train"},
        "counts": {"decontaminate": {"contaminated pairs": 4}},
        "files": {"train.jsonl": "abc"},
    }
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"sets": {"own": one}}))
    sources = [as_source({"set": "banking77"})]
    blend = SimpleNamespace(tables=[range(7)])
    for name in ("untrained", "base"):
        (tmp_path / name).mkdir()
    write_certificate(tmp_path / "untrained", untrained("org/decoder"))
    write_certificate(tmp_path / "base", certify("stage1", str(tmp_path / "untrained"), sources, None, blend, [70]))
    own = DatasetSource(str(built), name="mine")
    made_of = {"datasets": [provenance(own)]}
    blend = SimpleNamespace(tables=[range(1)])
    return certify("stage2", str(tmp_path / "base"), [own], made_of, blend, [5])


def test_stages_add_up_and_digests_and_counts_are_those_of_the_data(certificate, tmp_path):
    first, second = certificate["stages"]
    (banking,), (mine,) = first["sets"], second["sets"]
    assert (first["stage"], second["stage"]) == ("stage1", "stage2")
    assert (banking["source"], banking["set"], banking["triplets"], banking["trained_on"]) == (
        "mteb/banking77", "banking77", 7, 70,
    )  # fmt: skip
    assert mine["source"] is None, "no folder of this machine goes to the Hub"
    assert "/home/ann" not in json.dumps(certificate)
    assert mine["sha256"] == {"train.jsonl": sha256(tmp_path / "data" / "own" / "train.jsonl")}
    assert mine["build"]["counts"] == {"decontaminate": {"contaminated pairs": 4}}
    assert mine["build"]["manifest_sha256"] == sha256(tmp_path / "data" / "manifest.json")
    assert training_datasets(certificate) == {"Banking77Classification", "STS12"}


def test_tasks_are_seen_by_their_names_and_by_what_mteb_counts_as_similar(certificate):
    for task, seen in (("Banking77Classification", True), ("STS12", True), ("SciFact", False), ("STS13", False)):
        assert is_seen(mteb.get_task(task), certificate) is seen, task
    assert is_seen(mteb.get_task("Banking77Classification.v2"), certificate) is True
    assert is_seen(local_task("mine"), certificate) is True
    assert is_seen(local_task("mine"), None) is None


def test_what_a_base_without_a_certificate_has_seen_is_not_known(tmp_path):
    blend = SimpleNamespace(tables=[range(7)])
    source = DatasetSource("me/rows", instruction="", mteb=["NQ"])
    certificate = certify("stage1", "nvidia/NV-Embed-v2", [source], None, blend, [7])
    assert (certificate["complete"], certificate["base"]) == (False, "nvidia/NV-Embed-v2")
    assert is_seen(mteb.get_task("NQ"), certificate) is True
    assert is_seen(mteb.get_task("SciFact"), certificate) is None


def test_a_base_is_read_at_its_revision(certificate, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for number, (revision, license) in enumerate({"main": "mit", "v2": "apache-2.0"}.items()):
        folder, commit = tmp_path / "models--org--base", str(number) * 40
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        (folder / "snapshots" / commit / "README.md").write_text(f"---\nlicense: {license}\n---\n# Base\n")
        (folder / "snapshots" / commit / FILE).write_text(json.dumps(certificate | {"base": f"decoder of {revision}"}))
    blend, source = SimpleNamespace(tables=[range(7)]), DatasetSource("me/rows", instruction="")
    for revision, name, license in ((None, "main", "mit"), ("v2", "v2", "apache-2.0")):
        known = certify("stage2", "org/base", [source], None, blend, [7], revision)
        assert known["base"] == f"decoder of {name}" and known["stages"][:-1] == certificate["stages"]
        (tmp_path / name).mkdir()
        write_card(tmp_path / name, make_run("stage2", "org/base", revision=revision), "mine")
        assert ModelCard.load(tmp_path / name / "README.md").data.license == license


def test_a_set_built_with_further_tasks_keeps_them(tmp_path):
    built = tmp_path / "data" / "hover"
    write_jsonl(built / "train.jsonl", [{"query": "q", "positive": "p"}])
    one = {"source": {"path": "raw.jsonl", "mteb": ["FEVER"]}, "counts": {}, "files": {}}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"sets": {"hover": one}}))
    source = as_source({"set": "hover"}, str(tmp_path / "data"))
    assert mteb_names(source, find_build(source)) == {"FEVER"}


def test_the_card_names_the_sets_and_marks_the_scores(certificate, tmp_path):
    history = [{"step": 2, "eval_mine": 0.5, "eval_other": 0.25}]
    tasks = [local_task("mine"), local_task("other")]
    run = make_run("stage2", "org/decoder", history=history, tasks=tasks, certificate=certificate)
    table = evaluation_table(run)
    assert "| mine | ndcg at 10 | seen | 50.00 |" in table
    assert "| other | ndcg at 10 | zero-shot | 25.00 |" in table
    (tmp_path / "out").mkdir()
    write_card(tmp_path / "out", make_run("stage2", "org/decoder", certificate=certificate), "mine")
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'training_datasets = {\n    "Banking77Classification",\n    "STS12",\n}' in text
    assert f"]({FILE})" in text


def test_what_is_no_certificate_is_named(tmp_path):
    assert read_training_data(str(tmp_path)) is None
    (tmp_path / FILE).write_text('{"stages": [{"sets": [{"name": "x"}]}]}')
    with pytest.raises(ValueError, match="training_data.json does not say what the model was trained on"):
        read_training_data(str(tmp_path))


def test_the_report_marks_what_was_seen(tmp_path):
    detail = {"type": "STS", "metric": "cosine_spearman", "splits": ["test"], "dataset": "d", "dataset_revision": "r"}
    summary = {
        "tasks": {"a": 0.5, "b": 0.25},
        "details": {"a": detail | {"training_data": "seen"}, "b": detail | {"training_data": "zero-shot"}},
        "model": "me/model", "revision": "1",
    }  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    folder = write_report([read_run(str(tmp_path / "run"))], str(tmp_path / "out"))
    text = (folder / "report.md").read_text()
    assert "| a | STS | cosine_spearman | 50.00 * |" in text
    assert "| b | STS | cosine_spearman | 25.00 |" in text
    assert "zero-shot" in text
    assert "*" not in (folder / "tasks.csv").read_text()
