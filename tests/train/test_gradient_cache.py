from pathlib import Path

import pytest
import torch

from nvembed import NVEmbedModel
from nvembed.train.adapter import add_adapter
from nvembed.train.arguments import ModelArguments
from nvembed.train.collator import TripletCollator
from nvembed.train.gradient_cache import embed_chunks
from nvembed.train.losses import contrast
from tests import preloaded
from tests.conftest import randomize


def triplets_of(sentences):
    count = len(sentences)
    return [
        {
            "query": sentence[:20] * (i % 3 + 1),
            "positive": sentence,
            "negatives": [sentences[(i + 3) % count] * 2],
            "instruction": "Complete",
            "symmetric": False,
            "dataset": "test",
        }
        for i, sentence in enumerate(sentences)
    ]


def adapted(checkpoint, dropout=0.1, seed=0):
    """LoRA with random B, so that every gradient is far from zero."""
    torch.manual_seed(seed)
    model = add_adapter(NVEmbedModel.from_pretrained(checkpoint), ModelArguments(lora_dropout=dropout))
    randomize(model, std=0.05)
    return model.train()


def loss_and_gradients(model, batch, embed):
    model.zero_grad()  # not later: FSDP2 keeps the outermost weights gathered between the two passes
    torch.manual_seed(7)
    embeddings = embed(model, batch["chunks"])
    loss = contrast(
        embeddings[batch["query_index"]],
        embeddings[batch["passage_index"]],
        batch["query_ids"],
        batch["passage_ids"],
        temperature=0.1,
    ).losses.mean()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_all_activations(model, chunks):
    return torch.cat([model(**chunk).sentence_embeddings for chunk in chunks])


def assert_same(first, second, atol=1e-5):
    assert abs(first[0] - second[0]) < atol
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        difference = (second[1][name] - gradient).abs().max()
        assert difference < atol * max(1.0, gradient.abs().max()), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_cached_gradients_are_those_of_the_whole_batch_with_dropout(checkpoint, sentences, checkpointing):
    """The same chunks with all activations kept draw the same dropout: loss and every gradient agree."""
    model = adapted(checkpoint)
    batch = TripletCollator(model.tokenizer, model.config, 128, 1, chunk_tokens=100)(triplets_of(sentences))
    assert len(batch["chunks"]) > 5
    whole = loss_and_gradients(model, batch, with_all_activations)
    if checkpointing:  # of the layers, within the chunks
        model.get_base_model().gradient_checkpointing_enable()
    cached = loss_and_gradients(model, batch, embed_chunks)
    assert_same(whole, cached)
    assert len(whole[1]) > 42
    assert all(gradient.abs().max() > 1e-6 for gradient in whole[1].values())
    torch.manual_seed(8)
    other = embed_chunks(model, batch["chunks"])
    torch.manual_seed(7)
    assert (embed_chunks(model, batch["chunks"]) - other).abs().max() > 1e-3, "dropout is on"


def test_chunks_do_not_change_the_gradients(checkpoint, sentences):
    """Without dropout the number of chunks is no setting of the model: one call, or one text a chunk."""
    model = adapted(checkpoint, dropout=0.0)
    batches = [
        TripletCollator(model.tokenizer, model.config, 128, 1, chunk_tokens=budget)(triplets_of(sentences))
        for budget in (None, 1)
    ]
    assert len(batches[0]["chunks"]) == 1
    assert all(len(chunk["lengths"]) == 1 for chunk in batches[1]["chunks"])
    assert_same(*(loss_and_gradients(model, batch, embed_chunks) for batch in batches))


def test_only_one_chunk_of_activations_is_held(checkpoint, sentences):
    """What autograd keeps between the forward and the backward pass: that of the last chunk, not of all."""
    model = adapted(checkpoint)
    batch = TripletCollator(model.tokenizer, model.config, 128, 1, chunk_tokens=100)(triplets_of(sentences))

    def bytes_held(embed) -> int:
        held = {}

        def keep(tensor):
            held[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            embeddings = embed(model, batch["chunks"])
        del embeddings
        return sum(held.values())

    assert bytes_held(embed_chunks) < 0.5 * bytes_held(with_all_activations)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_cached_gradients_in_two_processes(tmp_path, checkpoint, sentences, sharding):
    """Half of the batch each, in different numbers of chunks: loss and gradients of the whole batch in one process."""
    triplets = triplets_of(sentences)
    torch.save({"checkpoint": str(checkpoint), "triplets": triplets, "sharding": sharding}, tmp_path / "job.pt")
    result = preloaded.run(Path(__file__).with_name("gradient_cache_worker.py"), tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert ranks[0]["chunks"] != ranks[1]["chunks"]
    model = adapted(checkpoint, dropout=0.0)
    batch = TripletCollator(model.tokenizer, model.config, 128, 1)(triplets)
    whole = loss_and_gradients(model, batch, with_all_activations)
    for rank in ranks:
        assert_same(rank["kept"], rank["cached"])
    loss = sum(rank["plain"][0] for rank in ranks) / 2
    for rank in ranks:
        assert_same(whole, (loss, rank["plain"][1]))
