import json
import subprocess
import sys

import numpy as np
import pytest

from nvembed.train.data.mine_negatives import add_negatives, write_triplets
from nvembed.train.data.teachers import BM25, split_words


class Fixed:
    """A teacher that gives one row of scores to every query."""

    def __init__(self, scores):
        self.row = np.array(scores, dtype=np.float32)

    def scores(self, queries, corpus):
        return (self.row for _ in queries)


def test_negatives_are_the_best_below_the_threshold():
    pair = {"query": "q", "positive": "pos", "known_positives": ["pos", "also right"]}
    corpus = ["pos", "too close", "best", "also right", "second", "third", "q"]
    teacher = Fixed([10.0, 9.6, 9.4, 8.0, 5.0, 1.0, 9.0])  # threshold 0.95 * 10
    (triplet,) = add_negatives([pair], corpus, 2, teacher=teacher)
    assert triplet == {"query": "q", "positive": "pos", "negatives": ["best", "second"]}


def test_a_candidate_too_close_is_no_negative_even_where_others_lack():
    (triplet,) = add_negatives(
        [{"query": "q", "positive": "pos"}], ["pos", "too close", "a"], 2, teacher=Fixed([10.0, 9.6, 0.0])
    )
    assert triplet["negatives"] == ["a"]


def test_corpora_without_a_word_get_random_negatives():
    pairs = [{"query": "it is", "positive": "🙂"}, {"query": "🙃", "positive": "a"}]
    first, second = add_negatives(pairs, ["🙂", "a", "the", " "], 2)
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


def test_bm25_ranks_scripts_without_spaces(caplog):
    query, positive, near_miss = "如何重置密码", "打开设置并选择账户即可重置密码", "如何重置路由器的密码和名称"
    (scores,) = BM25().scores([query], ["今天天气很好", positive, near_miss])
    assert scores[0] == 0 < scores[1] < scores[2], "the near miss shares more of the query"
    (scores,) = BM25().scores(["税"], ["如何报税", "今天天气很好"])
    assert scores[0] > scores[1] == 0
    pair = {"query": query, "positive": near_miss}
    for seed in range(5):
        (triplet,) = add_negatives([pair], ["今天天气很好", positive, "我们去公园"], 1, seed)
        assert triplet["negatives"] == [positive]
    (_, unmatched) = BM25().scores([query, "zebra"], [positive])
    assert not unmatched.any()
    (message,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "1 of 2 queries share no word with the corpus" in message


def test_missing_negatives_are_drawn_without_repetition():
    pair = {"query": "q", "positive": "pos"}
    (triplet,) = add_negatives([pair], ["pos", "a", "b", "c"], 5, teacher=Fixed([1.0, 0.5, 0.0, 0.0]))
    assert triplet["negatives"][0] == "a"
    assert sorted(triplet["negatives"]) == ["a", "b", "c"], "the corpus has no more"


def test_bm25_scores_equal_a_direct_loop():
    """Lucene's BM25 (k1 = 1.5, b = 0.75), word by word."""
    corpus = ["red apples grow", "green apples", "boats sail far across seas", "red boats"]
    words = [text.split() for text in corpus]
    mean_length = sum(map(len, words)) / len(words)
    query = ["red", "apples"]
    expected = []
    for document in words:
        score = 0.0
        for word in query:
            frequency = sum(word in other for other in words)
            idf = np.log(1 + (len(words) - frequency + 0.5) / (frequency + 0.5))
            count = document.count(word)
            score += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean_length))
        expected.append(score)
    (actual,) = BM25().scores([" ".join(query)], corpus)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_query_of_unknown_words_scores_nothing():
    (scores,) = BM25().scores(["zzz"], ["red apples", "boats"])
    assert scores.tolist() == [0.0, 0.0]


def test_script_writes_ready_triplets_and_overwrites_nothing(tmp_path):
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps({"query": f"w{i} a", "positive": f"w{i} b"}) + "\n" for i in range(4)))
    output = tmp_path / "out" / "mined.jsonl"
    command = [sys.executable, "-m", "nvembed.train.data.mine_negatives", "--path", source, "--output", output]
    subprocess.run([*command, "--num_negatives", "2", "--instruction", "Find"], check=True, capture_output=True)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 4
    assert all(len(row["negatives"]) == 2 and row["instruction"] == "Find" for row in rows)
    assert not list(output.parent.glob("*.partial"))
    with pytest.raises(FileExistsError, match="mined.jsonl exists"):
        write_triplets(rows, str(output))
