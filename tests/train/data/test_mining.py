import json
import random
from functools import partial

import numpy as np
import pytest

from nvembed.eval.vectors import MadeFrom, embed_shards
from nvembed.train.data import mining, teachers
from nvembed.train.data.corpus import Corpus
from nvembed.train.data.mining import MiningRules, mine_negatives
from nvembed.train.data.prepared import write_jsonl
from nvembed.train.data.source import Pairs
from nvembed.train.data.teachers import BM25, EmbeddingModel, Reranked, split_words
from tests import preloaded
from tests.conftest import ROOT


class Fixed:
    """A teacher with one row of scores for every query, as an embedding model has: it tells all documents apart."""

    block = 3

    def __init__(self, corpus, scores):
        self.corpus = list(corpus)
        self.row = np.array(scores, dtype=np.float32)

    def search(self, queries, k):
        order = np.argsort(-self.row, kind="stable")[:k]
        return (np.tile(x, (len(queries), 1)) for x in (self.row[order], order))

    def pair_scores(self, queries, documents):
        return self.row[[self.corpus.index(document) for document in documents]]


def mine(pairs, corpus, num_negatives, scores=None, **options):
    if scores is not None:
        options["make_teacher"] = partial(Fixed, scores=scores)
    return list(mine_negatives(Pairs(pairs, corpus), num_negatives, **options))


def test_negatives_are_the_best_below_the_threshold():
    pair = {"query": "q", "positive": "pos", "known_positives": ["pos", "also right"]}
    corpus = ["pos", "too close", "best", "also right", "second", "third", "q"]
    (triplet,) = mine([pair], corpus, 2, [10.0, 9.6, 9.4, 8.0, 5.0, 1.0, 9.0])  # threshold 0.95 * 10
    scores = pytest.approx([9.4, 5.0])
    expected = {"query": "q", "positive": "pos", "negatives": ["best", "second"]}
    assert triplet == expected | {"positive_score": 10.0, "negative_scores": scores}


def test_a_candidate_too_close_is_no_negative_even_where_others_lack():
    (triplet,) = mine([{"query": "q", "positive": "pos"}], ["pos", "too close", "a"], 2, [10.0, 9.6, 0.0])
    assert triplet["negatives"] == ["a"]


def test_negatives_far_down_the_ranking_are_found(monkeypatch):
    """All negatives lie behind more documents that are too close than are ranked at first."""
    monkeypatch.setattr(mining, "RANKS", 3000)  # some queries at a time
    corpus = ["pos", *(f"close {i}" for i in range(1500)), *(f"far {i}" for i in range(600))]
    scores = [100.0, *np.linspace(99.9, 96, 1500), *np.linspace(94, 1, 600)]
    pairs = [{"query": f"q{i}", "positive": "pos"} for i in range(5)]
    assert [row["negatives"] for row in mine(pairs, corpus, 3, scores)] == [["far 0", "far 1", "far 2"]] * 5


def test_mined_negatives_equal_a_direct_loop():
    """Every negative that scores above 0 is one of the best below the threshold, for BM25 over random words."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefghijklmnop", k=6)) + f" w{i}" for i in range(300)]
    pairs = [{"query": " ".join(rng.choices("abcdefghijklmnop", k=3)), "positive": text} for text in texts[:40]]
    corpus = list(dict.fromkeys(texts))
    teacher = BM25(Corpus(corpus))
    for triplet in mine(pairs, texts, 7):
        query, positive = triplet["query"], triplet["positive"]
        same_query = {pair["positive"] for pair in pairs if pair["query"] == query}
        scores = dict(zip(corpus, teacher.pair_scores([query] * len(corpus), corpus)))
        limit = 0.95 * scores[positive] if scores[positive] > 0 else 1e-9
        eligible = sorted((s for t, s in scores.items() if s < limit and t not in same_query), reverse=True)
        assert not same_query & set(triplet["negatives"])
        assert len(set(triplet["negatives"])) == 7
        np.testing.assert_allclose([scores[text] for text in triplet["negatives"]], eligible[:7], atol=1e-5)


@pytest.mark.parametrize(
    "rules",
    [
        MiningRules(fill=False),
        MiningRules(last_rank=20, fill=False),
        MiningRules(max_ratio=None, margin=0.1, first_rank=3, last_rank=30, fill=False),
        MiningRules(max_ratio=0.9, max_score=0.2, fill=False),
    ],
)
def test_an_embedding_teacher_equals_a_brute_force_miner_in_float64(tmp_path, rules):
    """With negative scores, equal scores, near-identical texts and several positives of a query."""
    rng = np.random.default_rng(0)
    texts = [f"text {i}" for i in range(300)]
    vectors = {text: rng.normal(size=6) for text in texts}
    vectors |= {f"TEXT {i}!": vectors[f"text {i}"] for i in range(0, 60, 3)}  # the same words
    vectors |= {f"twin {i}": vectors[f"text {i}"] for i in range(60, 120)}  # another text of the same vector
    queries = [f"query {i}" for i in range(40)]
    vectors |= {query: rng.normal(size=6) for query in queries}
    vectors = {text: vector / np.linalg.norm(vector) for text, vector in vectors.items()}
    corpus = [text for text in vectors if text not in queries]
    pairs = [{"query": queries[i % 40], "positive": texts[rng.integers(300)]} for i in range(60)]

    def embed(some, prefix):
        return np.stack([vectors[text] for text in some]).astype(np.float32)

    made_from = MadeFrom("m", "r", "", 64, "d")
    shards = embed_shards(embed, corpus, corpus, tmp_path / "v", made_from, shard_rows=100)
    mined = mine(
        pairs, corpus, 7, rules=rules, make_teacher=lambda corpus: EmbeddingModel(corpus, shards, embed, "Find")
    )
    of_query = {}
    for pair in pairs:
        of_query.setdefault(pair["query"], set()).add(pair["positive"])
    negative = 0
    for pair, triplet in zip(pairs, mined, strict=True):
        scores = {text: float(vectors[pair["query"]] @ vectors[text]) for text in corpus}
        bound = scores[pair["positive"]]
        limit = min(
            np.inf if rules.max_ratio is None else bound - (1 - rules.max_ratio) * abs(bound),
            np.inf if rules.margin is None else bound - rules.margin,
            np.inf if rules.max_score is None else rules.max_score,
        )
        negative += bound < 0
        known = {text.lower() for text in of_query[pair["query"]]}
        ranked = sorted(corpus, key=lambda text: (-round(scores[text], 6), corpus.index(text)))
        ranked = ranked[rules.first_rank - 1 : rules.last_rank]
        expected = [t for t in ranked if scores[t] < limit - 1e-7 and t.lower().rstrip("!") not in known][:7]
        assert triplet["negatives"] == expected
        np.testing.assert_allclose(triplet["negative_scores"], [scores[text] for text in expected], atol=1e-6)
        assert triplet["positive_score"] == pytest.approx(bound, abs=1e-6)
    assert negative > 5, "scores below 0 are among those tried"


def test_random_picks_are_of_the_ranks_asked_for():
    corpus = ["pos", *(f"document {i}" for i in range(300))]
    rules = MiningRules(pick="random", first_rank=151, last_rank=160)
    scores = [100.0, *np.linspace(90, 10, 300)]
    picked = set()
    for i in range(20):
        (triplet,) = mine([{"query": f"q{i}", "positive": "pos"}], corpus, 3, scores, rules=rules)
        assert triplet["negative_scores"] == sorted(triplet["negative_scores"], reverse=True)
        picked.update(triplet["negatives"])
    assert picked == {f"document {i}" for i in range(149, 159)}


def test_ranks_that_are_ruled_out_do_not_come_back():
    corpus = ["pos", *(f"document {i}" for i in range(20))]
    scores = [100.0, *np.linspace(90, 10, 20)]
    for rules, expected in ((MiningRules(last_rank=5), range(4)), (MiningRules(first_rank=19), range(17, 20))):
        (triplet,) = mine([{"query": "q", "positive": "pos"}], corpus, 7, scores, rules=rules)
        assert triplet["negatives"] == [f"document {i}" for i in expected]


def test_negatives_do_not_depend_on_the_pairs_beside():
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefgh", k=4)) + f" w{i}" for i in range(100)]
    pairs = [{"query": f"{' '.join(rng.choices('abcxyz', k=2))} {i}", "positive": texts[i]} for i in range(30)]
    together = mine(pairs, texts, 7)
    alone = [mine([pair], texts, 7)[0] for pair in pairs]
    assert together == alone


def test_reranked_by_a_cross_encoder():
    corpus = ["pos", "red b", "red c", "far"]

    def score(pairs):
        return np.array([{"pos": 0.9, "red b": 0.3, "red c": 0.5, "far": 0.8}[document] for _, document in pairs])

    (triplet,) = mine(
        [{"query": "red", "positive": "pos"}], corpus, 2,
        make_teacher=lambda corpus: Reranked(corpus, BM25(corpus), score), rules=MiningRules(fill=False),
    )  # fmt: skip
    assert triplet["negatives"] == ["red c", "red b"], "far shares no word, so BM25 does not find it"
    assert triplet["negative_scores"] == pytest.approx([0.5, 0.3])


def test_vectors_of_another_corpus_or_model_are_refused(tmp_path):
    def embed(some, prefix):
        return np.ones((len(some), 4), dtype=np.float32)

    shards = embed_shards(embed, ["0"], ["a"], tmp_path / "v", MadeFrom("m", "r", "", 64, "d"))
    with pytest.raises(ValueError, match="has 1 vectors for a corpus of 2 texts"):
        EmbeddingModel(Corpus(["a", "b"]), shards, embed, "")
    other = EmbeddingModel(Corpus(["a"]), shards, lambda some, prefix: np.ones((len(some), 5), dtype=np.float32), "")
    with pytest.raises(ValueError, match="vectors of width 4, the teacher's queries have 5"):
        other.search(["q"], 1)
    with pytest.raises(ValueError, match="'zebra' is not in the corpus of 1 texts"):
        other.pair_scores(["q"], ["zebra"])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_ratio": 1.5}, "max_ratio is 1.5"),
        ({"margin": -0.1}, "margin is -0.1"),
        ({"first_rank": 5, "last_rank": 3}, "ranks 5 to 3 hold no document"),
        ({"pick": "some"}, "pick is 'some'"),
        ({"pick": "random"}, "needs last_rank"),
    ],
)
def test_bad_rules_are_named(options, error):
    with pytest.raises(ValueError, match=error):
        MiningRules(**options)


def test_pairs_with_negatives_pass_unchanged():
    rows = [{"query": "q", "positive": "p", "negatives": ["n"]}, {"query": "r", "positive": "s", "negatives": []}]
    assert mine(rows, None, 5) == rows


def test_corpora_without_a_word_get_random_negatives():
    pairs = [{"query": "it is", "positive": "🙂"}, {"query": "🙃", "positive": "a"}]
    first, second = mine(pairs, ["🙂", "a", "the", " "], 2)
    assert sorted(first["negatives"]) == ["a", "the"]
    assert sorted(second["negatives"]) == ["the", "🙂"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("重置密码", ["重", "置", "密", "码", "重置", "置密", "密码"]),
        ("京タワー", ["京", "タ", "ワ", "ー", "京タ", "タワ", "ワー"]),
        ("ﾊﾟｽ", ["パ", "ス", "パス"]),  # half width
        ("กี่วัน", ["กี่", "วั", "น", "กี่วั", "วัน"]),  # letters with their marks
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("C語言, R and v2", ["C", "語", "言", "語言", "R", "and", "v2"]),
        ("茶", ["茶"]),
    ],
)
def test_words_of_every_script(text, words):
    assert split_words(text) == words


def bm25_scores(query, corpus):
    """The scores of all documents: by search, where it ranks them, and the same by pairs."""
    teacher = BM25(Corpus(corpus))
    (scores,), (positions,) = teacher.search([query], len(corpus))
    assert (np.diff(scores) <= 0).all()
    row = np.zeros(len(corpus), dtype=np.float32)
    row[positions[positions >= 0]] = scores[positions >= 0]
    np.testing.assert_allclose(teacher.pair_scores([query] * len(corpus), corpus), row, rtol=1e-6)
    return row


def test_bm25_ranks_scripts_without_spaces(caplog):
    query, positive, near_miss = "如何重置密码", "打开设置并选择账户即可重置密码", "如何重置路由器的密码和名称"
    scores = bm25_scores(query, ["今天天气很好", positive, near_miss])
    assert scores[0] == 0 < scores[1] < scores[2], "the near miss shares more of the query"
    scores = bm25_scores("税", ["如何报税", "今天天气很好"])
    assert scores[0] > scores[1] == 0
    pair = {"query": query, "positive": near_miss}
    for seed in range(5):
        (triplet,) = mine([pair], ["今天天气很好", positive, "我们去公园"], 1, seed=seed)
        assert triplet["negatives"] == [positive]
    mine([pair, {"query": "zebra", "positive": positive}], [positive], 1)
    (message,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "the data: 1 of 2 queries match no document of the corpus" in message


def test_missing_negatives_are_drawn_without_repetition():
    pair = {"query": "red apples", "positive": "red apples grow"}
    corpus = ["red apples grow", "red boats", *(f"grey {i}" for i in range(1000))]
    drawn = set()
    for seed in range(3):
        (triplet,) = mine([pair], corpus, 5, seed=seed)
        first, *others = triplet["negatives"]
        assert first == "red boats", "the one that is ranked comes first"
        assert len(set(others) - {"red apples grow", "red boats"}) == 4
        drawn |= set(others)
    assert len(drawn) > 4, "at random"
    (triplet,) = mine([pair], corpus[:4], 5)
    assert sorted(triplet["negatives"]) == ["grey 0", "grey 1", "red boats"], "the corpus has no more"


def test_bm25_scores_equal_a_direct_loop():
    """Lucene's BM25 (k1 = 1.5, b = 0.75), word by word."""
    corpus = ["red apples grow", "green apples", "boats sail far across seas", "red boats"]
    words = [text.split() for text in corpus]
    mean_length = sum(map(len, words)) / len(words)
    query = ["red", "apples", "red"]
    expected = []
    for document in words:
        score = 0.0
        for word in query:
            frequency = sum(word in other for other in words)
            idf = np.log(1 + (len(words) - frequency + 0.5) / (frequency + 0.5))
            count = document.count(word)
            score += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean_length))
        expected.append(score)
    np.testing.assert_allclose(bm25_scores(" ".join(query), corpus), expected, atol=1e-5)


@pytest.mark.slow
def test_the_compiled_search_of_large_corpora_gives_the_same_scores(monkeypatch):
    rng = random.Random(0)
    corpus = Corpus(sorted({" ".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(500)}))
    queries = [" ".join(rng.choices("abcdefghijklmnop", k=3)) for _ in range(50)]
    teacher = BM25(corpus)
    expected, _ = teacher.search(queries, 20)
    monkeypatch.setattr(teachers, "COMPILED", 1)
    compiled = BM25(corpus)
    assert compiled.index.backend == "numba"
    scores, positions = compiled.search(queries, 20)
    np.testing.assert_array_equal(scores, expected)
    for query, row, found in zip(queries, scores, positions):
        np.testing.assert_allclose(teacher.pair_scores([query] * 20, [corpus[i] for i in found]), row, rtol=1e-6)


def test_a_query_of_unknown_words_ranks_nothing():
    scores, positions = BM25(Corpus(["red apples", "boats"])).search(["zzz", "boats"], 5)
    assert scores[0].tolist() == [0.0, 0.0]
    assert positions.tolist() == [[-1, -1], [1, -1]]


@pytest.mark.slow
def test_script_writes_ready_triplets_and_overwrites_nothing(tmp_path):
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps({"query": f"w{i} a", "positive": f"w{i} b"}) + "\n" for i in range(4)))
    output = tmp_path / "out" / "mined.jsonl"
    command = [ROOT / "train/data/mine_negatives.py", "--path", source, "--output", output]
    done = preloaded.run(*command, "--num_negatives", "2", "--instruction", "Find")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 4
    assert all(len(row["negatives"]) == 2 and row["instruction"] == "Find" for row in rows)
    assert [path.name for path in output.parent.iterdir()] == ["mined.jsonl"]
    with pytest.raises(FileExistsError, match="mined.jsonl exists"):
        write_jsonl(output, rows)
    with source.open("a") as file:
        file.write(json.dumps({"query": "w9 a", "positive": "w9 b", "instruction": ""}) + "\n")
    assert preloaded.run(*command[:-1], tmp_path / "bare.jsonl").returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "bare.jsonl").read_text().splitlines()]
    assert not any("instruction" in row for row in rows[:4]), "training can still give one"
    assert rows[4]["instruction"] == "", "none, as the row says"
