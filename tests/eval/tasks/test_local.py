"""mteb's classes on local folders, against computations of our own; and what is wrong with folders."""

import json
import math
import random

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, v_measure_score

from nvembed.eval.encoder import TaskEncoder, describe_spread
from nvembed.eval.measure import measure
from nvembed.eval.models import LoadedModel
from nvembed.eval.results import main_score
from nvembed.eval.tasks.local import read_tasks
from nvembed.eval.tasks.lookup import instructions_for


SEED = 42  # mteb's


def score_of(task, embed):
    model = LoadedModel("tests/model", "r1", embed)
    results = measure([task], TaskEncoder(model, embed, instructions_for([task])))
    return main_score(task, results[task.metadata.name])


@pytest.fixture
def score(data, embed):
    """The harness's main score of the local task of a name."""

    def run(name):
        (task,) = read_tasks(str(data / "tasks.yaml"), [name])
        return score_of(task, embed)

    return run


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, *table):
    path.write_text("".join(json.dumps(row) + "\n" for row in table))


def cosine(a, b):
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


@pytest.fixture
def vectors(embed):
    return lambda texts: embed(texts, "")


def test_retrieval_is_ndcg_by_a_loop(data, score, vectors, embed):
    corpus = {row["_id"]: row["text"] for row in rows(data / "retrieval" / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in rows(data / "retrieval" / "queries.jsonl")}
    qrels = {}
    for line in (data / "retrieval" / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query_id, document_id, grade = line.split("\t")
        qrels.setdefault(query_id, {})[document_id] = int(grade)
    total = 0.0
    for query_id, grades in qrels.items():
        (query,) = vectors([queries[query_id]])
        similarity = {d: cosine(query, vectors([text])[0]) for d, text in corpus.items()}
        ranking = sorted(corpus, key=similarity.get, reverse=True)[:10]
        gain = sum(grades.get(d, 0) / math.log2(rank + 2) for rank, d in enumerate(ranking))
        best = sum(g / math.log2(rank + 2) for rank, g in enumerate(sorted(grades.values(), reverse=True)[:10]))
        total += gain / best
    embed.calls.clear()
    actual = score("retrieval")
    assert 0.02 < actual < 0.98
    assert actual == pytest.approx(round(total / len(qrels), 5), abs=1e-6)  # mteb keeps five digits
    assert [prefix for _, prefix in embed.calls] == ["Instruct: Do retrieval\nQuery: ", ""], "documents have none"


def test_reranking_is_mean_average_precision_by_a_loop(data, score, vectors, embed):
    total, examples = 0.0, rows(data / "reranking" / "test.jsonl")
    for example in examples:
        (query,) = vectors([example["query"]])
        candidates = [(text, 1) for text in example["positive"]] + [(text, 0) for text in example["negative"]]
        candidates.sort(key=lambda candidate: cosine(query, vectors([candidate[0]])[0]), reverse=True)
        hits = precision = 0
        for rank, (_, relevant) in enumerate(candidates, start=1):
            hits += relevant
            precision += relevant * hits / rank
        total += precision / len(example["positive"])
    embed.calls.clear()
    assert score("reranking") == pytest.approx(round(total / len(examples), 5), abs=1e-6)
    assert {prefix for _, prefix in embed.calls} == {"Instruct: Do reranking\nQuery: "}, "symmetric, as in the paper"


def test_equal_similarities_do_not_favour_the_positives(data):
    """As in mteb's own conversion of these columns: two positives come behind six negatives."""
    (task,) = read_tasks(str(data / "tasks.yaml"), ["reranking"])
    expected = (1 / 7 + 2 / 8) / 2
    assert score_of(task, lambda texts, prefix: np.ones((len(texts), 4), np.float32)) == round(expected, 5)


def test_classification_is_logistic_regression_on_eight_per_label(data, score, vectors):
    train, test = (rows(data / "classification" / f"{split}.jsonl") for split in ("train", "test"))
    order, accuracies = list(range(len(train))), []
    for _ in range(10):
        np.random.RandomState(SEED).shuffle(order)  # shuffled on from the last experiment's order
        chosen, counts = [], {}
        for i in order:
            label = train[i]["label"]
            if counts.setdefault(label, 0) < 8:
                chosen.append(i)
                counts[label] += 1
        classifier = LogisticRegression(max_iter=100, random_state=SEED)
        classifier.fit(vectors([train[i]["text"] for i in chosen]), [train[i]["label"] for i in chosen])
        predicted = classifier.predict(vectors([row["text"] for row in test]))
        accuracies.append(accuracy_score([row["label"] for row in test], predicted))
    actual = score("classification")
    assert 0.4 < actual < 1
    assert actual == pytest.approx(np.mean(accuracies), abs=1e-6)


def test_clustering_is_bootstrapped_k_means(data, score, vectors, embed):
    table = rows(data / "clustering" / "test.jsonl")
    embeddings, labels = vectors([row["text"] for row in table]), np.array([row["label"] for row in table])
    generator, measures = random.Random(SEED), []
    means = MiniBatchKMeans(n_clusters=3, batch_size=512, init="k-means++", n_init=1, random_state=SEED)
    for _ in range(10):
        drawn = generator.choices(range(len(table)), k=16_384)
        measures.append(v_measure_score(labels[drawn], means.fit_predict(embeddings[drawn])))
    actual = score("clustering")
    assert 0.05 < actual < 0.98
    assert actual == pytest.approx(np.mean(measures), abs=1e-6)
    (task,) = read_tasks(str(data / "tasks.yaml"), ["clustering"])
    assert score_of(task, embed) == score_of(task, embed) == actual, "a second evaluation samples as the first"


def test_sets_are_clustered_one_by_one(data, score, vectors):
    measures = []
    for row in rows(data / "sets" / "test.jsonl"):
        means = MiniBatchKMeans(n_clusters=3, batch_size=500, n_init="auto", random_state=SEED)
        measures.append(v_measure_score(row["labels"], means.fit_predict(vectors(row["sentences"]))))
    assert score("sets") == pytest.approx(np.mean(measures), abs=1e-6)


def test_sts_is_spearman(data, score, vectors, embed):
    table = rows(data / "sts" / "test.jsonl")
    similarity = [cosine(*vectors([row["sentence1"], row["sentence2"]])) for row in table]
    embed.calls.clear()
    assert score("sts") == pytest.approx(spearmanr(similarity, [row["score"] for row in table])[0], abs=1e-6)
    assert {prefix for _, prefix in embed.calls} == {"Instruct: Do sts\nQuery: "}


def test_pairs_are_scored_by_average_precision(data, score, vectors):
    table = rows(data / "pairs" / "test.jsonl")
    first, second = (vectors([row[side] for row in table]).astype(np.float64) for side in ("sentence1", "sentence2"))
    measures = {
        "cosine": [cosine(a, b) for a, b in zip(first, second)],
        "manhattan": -np.abs(first - second).sum(1),
        "euclidean": -np.sqrt(((first - second) ** 2).sum(1)),
        "dot": (first * second).sum(1),
    }

    def average_precision(similarity):
        hits = precision = 0
        for rank, i in enumerate(np.argsort(-np.asarray(similarity)), start=1):
            hits += table[i]["label"]
            precision += table[i]["label"] * hits / rank
        return precision / hits

    assert score("pairs") == pytest.approx(max(map(average_precision, measures.values())), abs=1e-6)


# --- Layouts


def test_beir_folder_to_rerank(data, embed):
    ranked = [{"query-id": f"q{i}", "corpus-ids": [f"d{j}" for j in range(90)]} for i in range(12)]
    (data / "retrieval" / "top_ranked").mkdir()
    (data / "retrieval" / "top_ranked" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    (data / "tasks.yaml").write_text("tasks: [{type: Reranking, path: retrieval, instruction: ''}]")
    (task,) = read_tasks(str(data / "tasks.yaml"))
    assert instructions_for([task])["retrieval"].query == "", "an empty instruction is none, without a warning"
    model = LoadedModel("tests/model", "r1", embed)
    result = measure([task], TaskEncoder(model, embed, instructions_for([task])))["retrieval"]
    assert result.scores["test"][0]["map_at_1000"] == main_score(task, result) > 0


def test_how_a_retrieval_tasks_embeddings_crowd_is_told_of_its_documents(data, embed):
    (data / "tasks.yaml").write_text("tasks: [{type: Retrieval, path: retrieval, instruction: Find it}]")
    tasks = read_tasks(str(data / "tasks.yaml"))
    encoder = TaskEncoder(LoadedModel("tests/model", "r1", embed), embed, instructions_for(tasks))
    measure(tasks, encoder)
    texts = {
        name: [row["text"] for row in rows(data / "retrieval" / f"{name}.jsonl")] for name in ("corpus", "queries")
    }
    expected = {name: describe_spread(embed(list(dict.fromkeys(side)), "")) for name, side in texts.items()}
    found = {name: encoder.texts["retrieval"][name] for name in expected["corpus"]}
    assert found == pytest.approx(expected["corpus"], abs=0.06) and expected["corpus"] != expected["queries"]
    assert encoder.texts["retrieval"]["texts"] == sum(map(len, texts.values()))


def test_pairs_as_one_row_of_lists(data, score):
    """MTEB's older layout."""
    table, one_by_one = rows(data / "pairs" / "test.jsonl"), score("pairs")
    nested = {"sentence1": [r["sentence1"] for r in table], "sentence2": [r["sentence2"] for r in table]}
    write(data / "pairs" / "test.jsonl", {**nested, "labels": [r["label"] for r in table]})
    assert score("pairs") == one_by_one


def test_words_that_pandas_takes_for_nothing(data):
    (data / "csv").mkdir()
    (data / "csv" / "test.csv").write_text("sentence1,sentence2,score\nNA,null,1.5\na,b,2\n")
    (data / "tasks.yaml").write_text("tasks: [{type: STS, path: csv}]")
    (task,) = read_tasks(str(data / "tasks.yaml"))
    assert task.dataset["default"]["test"][0] == {"sentence1": "NA", "sentence2": "null", "score": 1.5}


def test_csv_and_parquet(data, embed):
    from datasets import Dataset

    table = Dataset.from_list(rows(data / "sts" / "test.jsonl"))
    (data / "csv").mkdir()
    table.to_csv(data / "csv" / "test.csv")
    (data / "parquet").mkdir()
    table.to_parquet(data / "parquet" / "dev.parquet")
    (data / "tasks.yaml").write_text(
        "tasks: [{type: STS, path: csv}, {type: STS, path: parquet, split: dev, name: other}, {type: STS, path: sts}]"
    )
    tasks = read_tasks(str(data / "tasks.yaml"))
    assert [task.metadata.name for task in tasks] == ["csv", "other", "sts"]
    assert len({str(list(task.dataset["default"].values())[0].to_list()) for task in tasks}) == 1


def test_a_change_of_the_data_is_another_revision(data):
    def revision():
        (task,) = read_tasks(str(data / "tasks.yaml"), ["retrieval"])
        return task.metadata.revision

    before = revision()
    assert revision() == before
    with (data / "retrieval" / "qrels" / "test.tsv").open("a") as file:
        file.write("\nq0\td50\t1\nq0\td51\t1")
    assert revision() != before


# --- What is wrong


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("tasks: [", "is not valid YAML"),
        ("[]", "has no list `tasks:` with at least one task"),
        ("tasks: [5]", "task 1 is 5, not a mapping"),
        ("tasks: [{type: STS, path: sts, spilt: dev}]", "task 1 has an unknown field 'spilt'; a task has type, path"),
        ("tasks: [{path: sts}]", "task 1 has no `type:`"),
        ("tasks: [{type: Similarity, path: sts}]", "type is 'Similarity'; known types are Retrieval, Reranking"),
        ("tasks: [{type: STS, path: nowhere}]", "the folder .*nowhere does not exist; `path:` is relative to"),
        ("tasks: [{type: STS, path: sts, split: 5}]", "split is 5 of type int, not a string"),
        ("tasks: [{type: STS, path: sts, name: a/b}]", "name is 'a/b'; results are files of that name"),
        ("tasks: [{type: STS, path: sts}, {type: STS, path: sts}]", "two tasks are called 'sts'"),
        ("tasks: [{type: STS, path: sts, name: model_meta}]", "name is 'model_meta', which mteb writes"),
        ("tasks: [{type: STS, path: sts, split: dev}]", "no dev.jsonl, .csv or .parquet for task 'sts'; found"),
        ("tasks: [{type: STS, path: pairs}]", r'test.jsonl:1: "score" is missing; found'),
        ("tasks: [{type: Retrieval, path: sts}]", "is not in BEIR layout"),
        ('tasks: [{type: STS, path: sts, instruction: "a\\0b"}]', "task 1: instruction holds a NUL character"),
        ("tasks: [{type: Reranking, path: retrieval}]", r"top_ranked.test.jsonl is missing"),
    ],
)
def test_bad_tasks_files(data, content, words):
    (data / "tasks.yaml").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_tasks(str(data / "tasks.yaml"))


@pytest.mark.parametrize(
    ("name", "file", "row", "words"),
    [
        ("sts", "sts/test.jsonl", {"sentence1": "a", "sentence2": "b", "score": "x"}, "jsonl:1: \"score\" is 'x', not"),
        ("sts", "sts/test.jsonl", {"sentence1": "a", "sentence2": "b", "score": True}, '"score" is True, not a number'),
        ("sts", "sts/test.jsonl", {"sentence1": "a", "sentence2": "b", "score": math.nan}, '"score" is nan, not'),
        ("sts", "sts/test.jsonl", {"sentence1": "a", "sentence2": "b", "score": 1}, "all scores of .* are the same"),
        ("pairs", "pairs/test.jsonl", {"sentence1": "a", "sentence2": "b", "label": 1}, "has one pair; at least two"),
        ("pairs", "pairs/test.jsonl", {"sentence1": ["a"], "sentence2": [], "label": [1]}, "not of the same length"),
        ("classification", "classification/train.jsonl", {"text": "a", "label": "b"}, "all texts of .* the label 'b'"),
        (
            "clustering",
            "clustering/test.jsonl",
            {"sentences": [1], "labels": [2]},
            r'test.jsonl:1\[0\]: "sentences" is 1',
        ),
        ("clustering", "clustering/test.jsonl", {"sentences": [], "labels": []}, "of the same length, 1 or more"),
        ("clustering", "clustering/test.jsonl", {"sentences": ["a"], "labels": [None]}, '"labels" is None; it must be'),
        ("sts", "sts/test.jsonl", {"sentence1": 5, "sentence2": "b", "score": 1}, 'jsonl:1: "sentence1" is 5 of type'),
        ("pairs", "pairs/test.jsonl", {"sentence1": "a", "sentence2": "b", "label": 2}, '"label" is 2; a pair is 1'),
        ("pairs", "pairs/test.jsonl", {"sentence1": "a", "sentence2": "b"}, '"label" is missing'),
        (
            "classification",
            "classification/test.jsonl",
            {"text": "a", "label": "z"},
            "label 'z' of split 'test' is not",
        ),
        ("classification", "classification/train.jsonl", {"text": "a", "label": None}, '"label" is None; it must be'),
        ("clustering", "clustering/test.jsonl", {"sentences": ["a"], "labels": []}, "not lists of the same length"),
        ("reranking", "reranking/test.jsonl", {"query": "a", "positive": [], "negative": ["b"]}, '"positive" is ..; a'),
        ("reranking", "reranking/test.jsonl", {"query": "a", "positive": [1], "negative": ["b"]}, "is 1 of type int"),
        ("clustering", "clustering/test.jsonl", {"text": "a", "label": "\ud83d"}, 'jsonl:1: "label" holds half of a'),
        ("clustering", "clustering/test.jsonl", {"sentences": ["\0"], "labels": [1]}, '"sentences" holds a NUL'),
        ("reranking", "reranking/test.jsonl", {"query": "a", "positive": ["\0"], "negative": ["b"]}, "holds a NUL"),
        ("sts", "sts/test.jsonl", {"sentence1": "a", "sentence2": "\ud83d", "score": 1}, '"sentence2" holds half of'),
        ("retrieval", "retrieval/corpus.jsonl", {"_id": "d0", "text": "a"}, "names document 'd.+', which does not ex"),
    ],
)
def test_bad_rows_are_named(data, name, file, row, words):
    (data / file).write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=words):
        read_tasks(str(data / "tasks.yaml"), [name])


def test_empty_files_and_unknown_names(data):
    (data / "sts" / "test.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"sts.test.jsonl is empty; task 'sts' needs at least one row"):
        read_tasks(str(data / "tasks.yaml"), ["sts"])
    with pytest.raises(ValueError, match="has no task 'nothing'; its tasks are retrieval, reranking"):
        read_tasks(str(data / "tasks.yaml"), ["nothing"])
    with pytest.raises(ValueError, match="none.yaml does not exist"):
        read_tasks(str(data / "none.yaml"))
    with pytest.raises(ValueError, match="data cannot be read: .*directory"):
        read_tasks(str(data))
    write(data / "clustering" / "test.jsonl", {"text": "a", "label": "b"}, {"text": ["a"], "label": ["b"]})
    with pytest.raises(ValueError, match="some rows of split 'test' hold one text, others a list"):
        read_tasks(str(data / "tasks.yaml"), ["clustering"])


def test_documents_to_rerank_must_exist(data):
    (data / "retrieval" / "top_ranked").mkdir()
    file = data / "retrieval" / "top_ranked" / "test.jsonl"
    (data / "tasks.yaml").write_text("tasks: [{type: Reranking, path: retrieval}]")
    for row, words in (
        ({"query-id": "q0", "corpus-ids": None}, 'jsonl:1: "corpus-ids" is None, not a list'),
        ({"query-id": "q0", "corpus-ids": ["d99"]}, "jsonl:1: document 'd99' does not exist"),
        ({"query-id": "q0", "corpus-ids": ["d1"]}, "query 'q1' of the qrels has no documents to rerank"),
    ):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=words):
            read_tasks(str(data / "tasks.yaml"))
