"""What the benchmark of `encode` counts and compares."""

import argparse
import importlib.util

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nvembed.eval.search import exact_search
from nvembed.eval.speed import compressed, search
from nvembed.eval.speed import encode as benchmark
from nvembed.eval.vectors import VectorShards
from nvembed.modeling_nvembed import FoldedLatentAttention, MeanPooling


SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 50}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(benchmark.SHAPES, "tiny", SHAPE)
    return benchmark.random_model("tiny", 2, "cpu", torch.float32)


@pytest.mark.parametrize("way", ["unfolded", "folded", "mean"])
def test_useful_flops_are_those_that_torch_counts(tiny, way):
    lengths, config = [7, 5, 5, 1], tiny.config.latent_attention_config
    if way == "folded":
        tiny.latent_attention_model = FoldedLatentAttention.fold(tiny.latent_attention_model, config)
    elif way == "mean":
        tiny.latent_attention_model = MeanPooling(config).eval()
    # The counter knows attention as two matrix products, not as the CPU's fused kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tiny(torch.randint(50, (sum(lengths),)), lengths=lengths)
    counted = counter.get_total_flops()
    if way == "unfolded":  # the latents' own keys and values, which the fold computes once for all
        counted -= 2 * config.num_latents_value * config.latent_dim * 2 * 8 * config.cross_dim_head
    assert benchmark.useful_flops(tiny.config, lengths, way) == counted


def test_released_way_computes_the_same(tiny):
    texts = benchmark.real_texts()[0][:40]
    tiny.tokenizer = benchmark.train_tokenizer(texts)
    tiny.resize_token_embeddings(len(tiny.tokenizer))
    expected = tiny.encode(texts, benchmark.INSTRUCTION)
    actual = benchmark.released_encode(tiny, texts, benchmark.INSTRUCTION, 512)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_ways_that_disagree_are_not_timed():
    vectors = dict(zip(benchmark.WAYS, torch.eye(4).unsqueeze(1)))
    arguments = argparse.Namespace(dtype="float32")
    with pytest.raises(AssertionError, match="unfolded is at a cosine distance of 1 from released"):
        benchmark.check_agreement(lambda way: None, lambda way, texts: vectors[way], ["a"], arguments)
    same = dict.fromkeys(benchmark.WAYS, torch.ones(1, 4))
    with pytest.raises(AssertionError, match="mean is at a cosine distance of 0 from released"):
        benchmark.check_agreement(lambda way: None, lambda way, texts: same[way], ["a"], arguments)


def test_texts_have_the_lengths_that_results_state():
    sentences, passages = benchmark.real_texts()
    assert len(sentences) > 512
    assert len(passages) > 128
    assert all(5 <= len(sentence.split()) <= 15 for sentence in sentences)
    assert all(len(passage.split()) >= 120 for passage in passages)


def test_the_search_benchmark_compares_with_float64(tmp_path):
    search.write_random(tmp_path, 300, 8)
    vectors = VectorShards(tmp_path)
    queries = search.random_unit(5, 8, 1)
    scores, _ = exact_search(queries, vectors.blocks(), 10)
    assert search.check(queries, vectors, scores) < 1e-6
    assert search.check(queries, vectors, scores + 0.01) == pytest.approx(0.01, abs=1e-6)


def test_two_of_four_keeps_the_largest():
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    kept = compressed.keep_two_of_four(weight)
    for row, pruned in zip(weight.tolist(), kept.tolist()):
        for start in range(0, 16, 4):
            group = row[start : start + 4]
            largest = sorted(range(4), key=lambda i: abs(group[i]))[2:]
            assert pruned[start : start + 4] == [group[i] if i in largest else 0 for i in range(4)]


def test_compressed_ways_are_timed_and_the_impossible_is_reported(tiny, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.SHAPES, "tiny", SHAPE | {"vocab_size": 9000})
    arguments = "--shape tiny --layers 1 --texts 4 --rounds 1 --ways int8-weights 2:4"  # int8 needs torchao
    compressed.main(arguments.split())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    table = {row[0]: row[1:] for row in rows if row}
    has_torchao = importlib.util.find_spec("torchao") is not None
    assert float(table["int8-weights"][5]) > 0.99 if has_torchao else "torchao" in table["int8-weights"][0]
    assert table["dense"][4] == "1.00 (1.00-1.00)"
    assert table["2:4"][0].startswith("RuntimeError"), "torch's kernel is for GPUs"
