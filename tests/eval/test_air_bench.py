"""AIR-Bench's own package on small copies of two of its data sets, in the layout in which it loads them."""

import json
import math
import zipfile

import pytest

from nvembed import NVEmbedModel


pytest.importorskip("air_benchmark")

from nvembed.eval.run_air_bench import VERSION, AirBenchArguments, run  # noqa: E402


WORDS = ("folder", "server", "date", "key", "words", "message", "circle", "numbers")
QUESTION = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "


@pytest.fixture
def air_bench(tmp_path, monkeypatch, sentences):
    """Repositories AIR-Bench/qa_wiki_en and its dev judgements; the corpus is `sentences`."""
    queries = [{"id": f"q{i}", "text": f"What of the {word}?"} for i, word in enumerate(WORDS)]
    qrels = [{"qid": f"q{i}", "docid": f"d{(3 * i) % 8}", "relevance": 1} for i in range(8)]
    tables = {
        "qa_wiki_en": {
            "corpus_default": [{"id": f"d{i}", "text": text} for i, text in enumerate(sentences)],
            "queries_default_dev": queries[:4],
            "queries_default_test": queries[4:],
        },
        "qrels-qa_wiki_en-dev": {"qrels_default_dev": qrels[:4]},
    }
    for repository, splits in tables.items():
        folder = tmp_path / "AIR-Bench" / repository
        folder.mkdir(parents=True)
        for split, rows in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = "".join(f"  - {{split: {split}, path: {split}.jsonl}}\n" for split in splits)
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {VERSION}\n  data_files:\n{files}---\n")
    monkeypatch.chdir(tmp_path)
    return queries


@pytest.fixture
def arguments(checkpoint, tmp_path):
    def make(**options):
        defaults = {"task_types": ["qa"], "domains": ["wiki"], "max_length": 64}
        return AirBenchArguments(str(checkpoint), str(tmp_path / "out"), **(defaults | options))

    return make


def test_dev_is_scored_and_test_is_zipped(air_bench, arguments, checkpoint, sentences):
    folder = run(arguments())
    model = NVEmbedModel.from_pretrained(checkpoint)
    queries = model.encode([query["text"] for query in air_bench], QUESTION, 64)
    similarity = (queries @ model.encode(sentences, "", 64).T).tolist()
    total = 0.0
    for i in range(4):
        rank = sorted(range(8), key=lambda d, i=i: -similarity[i][d]).index((3 * i) % 8)
        total += 1 / math.log2(rank + 2)
    scores = json.loads((folder / "dev_scores.json").read_text())
    (by_type,) = scores.values()
    dev = by_type["NoReranker"]["qa"]["wiki"]["en"]["default"]
    assert dev["ndcg_at_10"] == pytest.approx(total / 4, abs=1e-5)
    assert "ndcg_at_10" in (folder / "dev_scores.md").read_text()

    (archive,) = folder.glob("*_NoReranker.zip")
    with zipfile.ZipFile(archive) as content:
        assert content.namelist() == ["qa/wiki/en_default_test.json"], "the leaderboard's layout, test splits alone"
        entry = json.loads(content.read("qa/wiki/en_default_test.json"))
    assert {key: entry[key] for key in ("benchmark_version", "task_type", "domain", "language", "split")} == {
        "benchmark_version": VERSION, "task_type": "qa", "domain": "wiki", "language": "en", "split": "test",
    }  # fmt: skip
    assert entry["model_name"] == archive.name.removesuffix("_NoReranker.zip")
    for i in range(4, 8):
        expected = {f"d{d}": pytest.approx(score, abs=1e-5) for d, score in enumerate(similarity[i])}
        assert entry["search_results"][f"q{i}"] == expected
    assert list((folder / "embeddings").iterdir()) == [], "nothing large is left"


def test_what_is_done_is_not_searched_again(air_bench, arguments, monkeypatch, caplog):
    folder = run(arguments())
    results = {path: path.read_bytes() for path in (folder / "search_results").rglob("*.json")}
    cut = next(path for path in results if path.name == "en_default_dev.json")
    monkeypatch.setattr(NVEmbedModel, "encode", None)  # fails if anything is embedded
    run(arguments())
    assert {path: path.read_bytes() for path in (folder / "search_results").rglob("*.json")} == results
    monkeypatch.undo()

    monkeypatch.chdir(folder.parent)
    cut.write_bytes(results[cut][:50])
    run(arguments())
    assert cut.read_bytes() == results[cut]
    assert "en_default_dev.json was cut off when it was written" in caplog.text


def test_bad_input(air_bench, arguments, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Invalid task type: qaa"):
        run(arguments(task_types=["qaa"]))
    run(arguments())
    with pytest.raises(ValueError, match="holds results with instruction .* this run has 'Other'"):
        run(arguments(instruction="Other"))
    with pytest.raises(ConnectionError, match="AIR-Bench: the data is not in the cache and failed to load from"):
        run(AirBenchArguments(arguments().model, str(tmp_path / "law"), domains=["law"]))
