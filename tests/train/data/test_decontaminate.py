import json
import math
import re

import mteb
import pytest
from datasets import Dataset

from nvembed.eval.tasks.lookup import select_tasks
from nvembed.train.data.decontaminate import (
    BM25Similarity,
    DecontaminationRule,
    Decontaminator,
    _texts_of_task,
    clean_triplet,
    evaluation_texts,
    read_rule,
)
from tests import preloaded
from tests.conftest import ROOT
from tests.triplets import write_jsonl


LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"
EVALUATION = {"sts": ["The cat sat.", f"{LONG} and more"], "bank": ["Where is my new card?", "..."]}


def matches(texts, match, **options):
    rule = DecontaminationRule(["anything"], match, **options)
    found = Decontaminator(rule, EVALUATION).find(texts)
    return [None if one is None else (one.match, one.set) for one in found]


def test_matches():
    texts = ["The cat sat.", "the CAT  sat", f"so {LONG.upper()}!", LONG.removesuffix(" thirteen"), "my card", "!!!"]
    assert matches(texts, ["exact"]) == [("exact", "sts"), *[None] * 5]
    assert matches(texts, ["normalized"]) == [("exact", "sts"), ("normalized", "sts"), *[None] * 4]
    assert matches(texts, ["ngram"]) == [None, None, ("ngram", "sts"), None, None, None]
    assert matches(texts, ["ngram"], n=12)[3] == ("ngram", "sts")
    assert matches(texts, ["ngram"], n=3)[:2] == [("ngram", "sts")] * 2


def test_bm25_similarity_equals_a_direct_loop():
    """Lucene's BM25 (k1 = 1.5, b = 0.75); the score of two texts over the higher of their own."""
    texts = ["my new card is lost", "my card", "boats sail far across the seas", "red boats boats"]
    words = [text.split() for text in texts]
    mean = sum(map(len, words)) / len(words)

    def score(query, document):
        total = 0.0
        for word in set(query):
            frequency = sum(word in other for other in words)
            count = document.count(word)
            norm = 1.5 * (0.25 + 0.75 * len(document) / mean)
            total += math.log(1 + (len(words) - frequency + 0.5) / (frequency + 0.5)) * count / (count + norm)
        return total

    for query in ["my lost card", "boats boats sail", "unknown words of my card", "my card"]:
        its = query.split()
        expected = [score(its, w) / max(score(its, its), score(w, w)) for w in words]
        ((similarity, text),) = BM25Similarity(texts).nearest([query])
        assert similarity == pytest.approx(max(expected), rel=1e-5)
        assert text == texts[expected.index(max(expected))]
    assert list(BM25Similarity(texts).nearest(["zebra", "My CARD"])) == [(0.0, ""), (pytest.approx(1.0), "my card")]
    assert list(BM25Similarity(["..."]).nearest(["zebra"])) == [(0.0, "")]


def test_bm25_matches_from_its_threshold_on():
    near = "where is my new red card"
    texts = [text for its in EVALUATION.values() for text in its]
    ((similarity, _),) = BM25Similarity(texts).nearest([near])
    assert 0.3 < similarity < 1
    assert matches([near], ["bm25"], threshold=similarity - 1e-3) == [("bm25", "bank")]
    assert matches([near], ["bm25"], threshold=similarity + 1e-3) == [None]


def test_the_same_texts_match_by_bm25_at_any_threshold():
    texts = [f"word{i % 17} word{i % 5} of text {i} and {'more ' * (i % 4)}" for i in range(200)]
    rule = DecontaminationRule(["x"], ["bm25"], threshold=1.0)
    assert all(Decontaminator(rule, {"set": texts}).find(texts))


def test_ngrams_of_scripts_without_spaces_are_of_characters():
    long = "今天天气很好我们去公园散步然后回家吃饭"
    found = Decontaminator(DecontaminationRule(["x"], ["ngram"]), {"set": [long]}).find([f"昨天说{long}", long[:12]])
    assert [one and one.match for one in found] == ["ngram", None]


def test_only_the_evaluated_splits_of_a_task_count():
    """mteb keeps a task of one language by split, others by language and split."""
    parts = {split: Dataset.from_list([{"text": f"{split} text", "label": 0}]) for split in ("train", "test")}
    for data in (parts, {"en": parts}):
        task = mteb.get_task("EmotionClassification")
        task.dataset, task.data_loaded = data, True
        assert list(_texts_of_task(task, False)) == ["test text"]
    (task,) = select_tasks(["AmazonCounterfactualClassification"])  # of its two splits, the benchmark has one
    task.dataset, task.data_loaded = {"en": parts | {"validation": parts["train"]}}, True
    assert list(_texts_of_task(task, False)) == ["test text"]


def test_two_files_of_one_name_are_both_compared_with(tmp_path):
    names = [write_jsonl(tmp_path / folder / "test.jsonl", [{"text": folder}]) for folder in ("a", "b")]
    assert evaluation_texts(DecontaminationRule(names)) == {"test": ["a", "b"]}


def test_negatives_are_dropped_alone_and_a_query_or_positive_with_its_triplet():
    find = Decontaminator(DecontaminationRule(["x"], ["normalized"]), EVALUATION).find
    triplet = {
        "query": "q",
        "positive": "p",
        "negatives": ["a", "the cat sat", "b"],
        "negative_scores": [3.0, 2.0, 1.0],
    }
    kept, dropped = clean_triplet(triplet, find)
    assert (kept["negatives"], kept["negative_scores"]) == (["a", "b"], [3.0, 1.0])
    assert [(part, text) for part, text, _ in dropped] == [("negative", "the cat sat")]
    kept, dropped = clean_triplet(triplet | {"positive": "The cat sat"}, find)
    assert kept is None
    assert [part for part, _, _ in dropped] == ["positive"]


@pytest.fixture
def tasks(tmp_path):
    write_jsonl(tmp_path / "sts" / "test.jsonl", [
        {"sentence1": "a cat", "sentence2": "a dog", "score": 1.0}, {"sentence1": "a", "sentence2": "b", "score": 2.0},
    ])  # fmt: skip
    folder = tmp_path / "search"
    write_jsonl(folder / "corpus.jsonl", [{"_id": "d", "title": "T", "text": "document"}, {"_id": "e", "text": "x"}])
    write_jsonl(folder / "queries.jsonl", [{"_id": "q", "text": "question"}, {"_id": "r", "text": "of training"}])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    path = tmp_path / "tasks.yaml"
    path.write_text("tasks:\n  - {type: STS, path: sts}\n  - {type: Retrieval, path: search}\n")
    return str(path)


def test_texts_of_tasks_and_tables(tasks, tmp_path):
    table = write_jsonl(tmp_path / "more.jsonl", [{"text": "one", "label": 1}, {"text": "one", "label": 2}])
    texts = evaluation_texts(DecontaminationRule([tasks, table]))
    assert texts == {"sts": ["a cat", "a dog", "a", "b"], "search": ["question"], "more": ["one"]}
    with_documents = evaluation_texts(DecontaminationRule([tasks], documents=True))
    assert with_documents["search"] == ["question", "T document", "x"]


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        ({}, "{} does not say `against:` what"),
        ({"against": []}, "against is empty; it must be a list"),
        ({"against": "STS12"}, "against is 'STS12' of type str, not list"),
        ({"against": ["x"], "match": ["fuzzy"]}, "match has 'fuzzy'; known are exact"),
        ({"against": ["x"], "n": 0}, "n is 0"),
        ({"against": ["x"], "match": ["bm25"], "threshold": 1.5}, "threshold is 1.5"),
        (
            {"against": ["x"], "threshold": 0.6},
            "threshold is 0.6, which is of the match bm25, and match is normalized, n",
        ),
        (
            {"against": ["x"], "match": ["exact"], "n": 8},
            "n is 8, which is of the match ngram, and match is exact: add",
        ),
        ({"against": ["x"], "ngrams": 3}, "unknown key 'ngrams'"),
        ({"against": ["x"], "n": True}, "n is True of type bool, not int"),
        ({"against": ["x"], "documents": "no"}, "documents is 'no' of type str, not bool"),
        ({"against": ["x"], "threshold": "0.8"}, "threshold is '0.8' of type str, not float"),
    ],
)
def test_bad_rules_are_named(rule, error):
    with pytest.raises(ValueError, match=error):
        read_rule(rule)


@pytest.mark.slow  # mteb looks for names like it
def test_sets_that_do_not_exist_or_hold_no_texts_are_named(tmp_path):
    with pytest.raises(ValueError, match="'Banking77' is neither a benchmark nor a task of mteb"):
        evaluation_texts(DecontaminationRule(["Banking77"]))
    with pytest.raises(ValueError, match="the data of Banking77Classification failed to load"):
        evaluation_texts(DecontaminationRule(["Banking77Classification"]))  # tests are offline
    table = write_jsonl(tmp_path / "t.jsonl", [{"sentence": "one"}])
    with pytest.raises(ValueError, match="holds no texts in columns text"):
        evaluation_texts(DecontaminationRule([table]))


@pytest.mark.slow
def test_script(tmp_path, tasks):
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negatives": ["n"]} for i in range(3)]
    rows[1]["positive"] = "A  dog"
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    command = [ROOT / "train/data/decontaminate.py", "--path", path, "--against", tasks]
    dry = preloaded.run(*command, "--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert json.loads(dry.stdout) == {"triplets": 3, "positive, normalized, sts": 1, "triplets dropped": 1}
    output = tmp_path / "clean.jsonl"
    assert preloaded.run(*command, "--output", output).returncode == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["query"] for row in written] == ["q0", "q2"]
    assert not any("instruction" in row for row in written), "training can still give one"
    (dropped,) = json.loads((tmp_path / "clean.report.json").read_text())["dropped"]
    assert dropped == {"part": "positive", "text": "A  dog", "match": "normalized", "set": "sts", "with": "a dog"}
    again = preloaded.run(*command, "--output", output)
    assert again.returncode == 1
    assert re.search(r"decontaminate: .*clean.jsonl exists", again.stderr)
