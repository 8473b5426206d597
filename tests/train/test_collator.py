import pytest
import torch

from nvembed.texts_nvembed import format_instruction
from nvembed.train.collator import TripletCollator, text_id
from nvembed.train.losses import NO_TEXT


def triplet(query, positive, negatives, instruction="", symmetric=False):
    return {
        "query": query,
        "positive": positive,
        "negatives": negatives,
        "instruction": instruction,
        "symmetric": symmetric,
        "dataset": "test",
    }


def test_more_tokens_than_the_decoder_has_positions_are_refused(model):
    model.config.text_config.max_position_embeddings = 64
    TripletCollator(model.tokenizer, model.config, max_length=64)
    with pytest.raises(ValueError, match="max_length is 65 and the decoder has 64 positions .*; set max_length: 64 or"):
        TripletCollator(model.tokenizer, model.config, max_length=65)


def test_batch_embeds_as_encode_does(model, sentences):
    """Training and inference share tokenizing and pooling mask: the collator's chunks give `encode`'s embeddings."""
    a, b, c, d, e, f, g, h = sentences
    triplets = [
        triplet(a, b, [c, d, "dropped: num_negatives is 2"], "Find it"),
        triplet(e, f, [b], "Same kind", symmetric=True),
        triplet(g, h, []),
    ]
    batch = TripletCollator(model.tokenizer, model.config, max_length=64, num_negatives=2, chunk_tokens=60)(triplets)
    with torch.no_grad():
        embeddings = torch.cat([model(**chunk).sentence_embeddings for chunk in batch["chunks"]])
    assert len(batch["chunks"]) > 2
    assert batch["datasets"] == ["test"] * 3
    find, same = format_instruction("Find it"), format_instruction("Same kind")
    queries = torch.cat([model.encode([a], find), model.encode([e], same), model.encode([g])])
    torch.testing.assert_close(embeddings[batch["query_index"]], queries, atol=1e-6, rtol=0)
    passages = embeddings[batch["passage_index"]]
    torch.testing.assert_close(passages[0], model.encode([b, c, d]), atol=1e-6, rtol=0)
    torch.testing.assert_close(passages[1, :2], model.encode([f, b], same), atol=1e-6, rtol=0)
    torch.testing.assert_close(passages[2, :1], model.encode([h]), atol=1e-6, rtol=0)
    assert batch["query_ids"].tolist() == [text_id(a), text_id(e), text_id(g)]
    assert batch["passage_ids"].tolist() == [
        [text_id(b), text_id(c), text_id(d)],
        [text_id(f), text_id(b), NO_TEXT],
        [text_id(h), NO_TEXT, NO_TEXT],
    ]


def test_chunks_keep_to_the_budget_and_hold_each_text_once(model, sentences):
    texts = [sentence * (i % 4 + 1) for i, sentence in enumerate(sentences)]
    triplets = [triplet(texts[i], texts[i + 1], [texts[0]]) for i in range(6)]
    batch = TripletCollator(model.tokenizer, model.config, 256, num_negatives=1, chunk_tokens=150)(triplets)
    lengths = [chunk["lengths"] for chunk in batch["chunks"]]
    assert sum(map(len, lengths)) == len(set(texts[:7])), "a text that occurs twice is embedded once"
    assert all(sum(chunk) <= 150 for chunk in lengths)
    assert len(lengths) > 1
    assert sum(lengths[-1]) + lengths[-2][0] > 150, "the last, which is embedded once, is full"
    flat = [length for chunk in reversed(lengths) for length in chunk]
    assert flat == sorted(flat, reverse=True)
    whole = TripletCollator(model.tokenizer, model.config, 256, num_negatives=1)(triplets)["chunks"]
    assert [chunk["lengths"] for chunk in whole] == [flat]


def test_text_identity_is_stable_and_fits_int64():
    assert text_id("NV-Embed") == 782987695616353549
    assert all(0 <= text_id(str(i)) < 2**63 for i in range(1000))


def test_hard_negatives_that_the_teacher_scores_as_the_positive_are_left_out(model):
    scored = {"query": "q", "positive": "p", "negatives": ["a", "b", "c"], "dataset": "d", "instruction": "",
              "symmetric": False, "positive_score": 0.8, "negative_scores": [0.95, 0.9, 0.1]}  # fmt: skip
    unscored = scored | {"query": "r", "positive_score": None, "negative_scores": None}
    collator = TripletCollator(model.tokenizer, model.config, 64, 2, false_negative_margin=0.1)
    batch = collator([scored, unscored])
    assert batch["false_negatives"].tolist() == [2, 0]
    assert batch["passage_ids"][0].tolist() == [text_id("p"), text_id("c"), NO_TEXT]
    assert batch["passage_ids"][1].tolist() == [text_id("p"), text_id("a"), text_id("b")]
    plain = TripletCollator(model.tokenizer, model.config, 64, 2)([scored])
    assert plain["passage_ids"][0].tolist() == [text_id("p"), text_id("a"), text_id("b")]
