"""What only a GPU can show: the CUDA kernels' numbers, forward and backward, and the ways that users take there.

Skipped without a GPU; `tests/gpu.py` runs this file, and the benchmarks, on a machine that has one.
"""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.sparse import to_sparse_semi_structured
from transformers import BitsAndBytesConfig

from nvembed import NVEmbedModel
from nvembed.eval.log_history import LOG_FILE
from nvembed.eval.speed.compressed import keep_two_of_four
from nvembed.eval.vectors import VectorShards
from nvembed.texts_nvembed import PackedLayout, has_varlen_kernel
from nvembed.train.center import CenterArguments
from nvembed.train.center import main as center
from tests.conftest import ROOT
from tests.test_golden import CASES, encode_case


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

QUESTION = "Given a question, retrieve passages that answer the question"


def reference_attention(q, k, v, lengths, is_causal):
    """Attention in float64, text by text and head by head."""
    out, start, group = [], 0, q.shape[1] // k.shape[1]
    for length in lengths:
        part = slice(start, start + length)
        heads = []
        for head in range(q.shape[1]):
            scores = q[part, head] @ k[part, head // group].T / q.shape[-1] ** 0.5
            if is_causal:
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            heads.append(scores.softmax(-1) @ v[part, head // group])
        out.append(torch.stack(heads, dim=1))
        start += length
    return torch.cat(out)


def relative_error(actual, expected):
    return ((actual.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_of_packed_texts_and_its_gradients_equal_float64(head_dim, is_causal):
    lengths = [1, 7, 7, 33, 128, 250]
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths), 8, head_dim), *[(sum(lengths), 2, head_dim)] * 2)
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    weights = torch.randn(shapes[0], generator=generator).bfloat16()

    exact = [x.double().requires_grad_() for x in inputs]
    expected = reference_attention(*exact, lengths, is_causal)
    (expected * weights.double()).sum().backward()

    ours = [x.cuda().requires_grad_() for x in inputs]
    assert has_varlen_kernel(ours[0], is_causal)
    actual = PackedLayout(lengths).attend(*ours, is_causal)
    (actual * weights.cuda()).sum().backward()

    assert relative_error(actual.detach(), expected.detach()) < 1e-2
    for mine, theirs in zip(ours, exact):
        assert relative_error(mine.grad, theirs.grad) < 1e-2


def test_attention_takes_what_semi_structured_layers_return():
    """torch's 2:4 linear layers, whose outputs are column-major."""
    torch.manual_seed(0)
    lengths = [5, 60, 31]
    x = torch.randn(sum(lengths), 128, device="cuda", dtype=torch.bfloat16)
    weights = (torch.randn(128, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    sparse = [to_sparse_semi_structured(keep_two_of_four(weight)) for weight in weights]
    q, k, v = (F.linear(x, weight).view(-1, 2, 64) for weight in sparse)
    assert q.stride(-1) != 1 and k.stride(-1) != 1 and v.stride(-1) != 1
    layout = PackedLayout(lengths)
    torch.testing.assert_close(layout.attend(q, k, v), layout.attend(q.contiguous(), k.contiguous(), v.contiguous()))


@pytest.mark.parametrize("is_folded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_golden_cases(golden_dir, name, is_folded):
    case = next(c for c in json.loads((golden_dir / "cases.json").read_text()) if c["name"] == name)
    expected = load_file(golden_dir / "expected.safetensors")[name]
    options = {"fold_latent_attention": is_folded}
    model = NVEmbedModel.from_pretrained(golden_dir / "checkpoint", **options).cuda()
    torch.testing.assert_close(encode_case(model, case).cpu(), expected, atol=1e-5, rtol=0)
    model = NVEmbedModel.from_pretrained(golden_dir / "checkpoint", dtype=torch.bfloat16, **options).cuda()
    cosines = torch.cosine_similarity(encode_case(model, case).float().cpu(), expected)
    assert cosines.min() > 0.999


def test_encode_halves_its_batches_when_the_gpu_is_full(model, sentences, caplog):
    """Half of the memory that all texts at once take is allowed, and they are asked for at once."""
    texts = [" ".join(sentences * 4)] * 2048
    model = model.cuda()
    expected = model.encode(texts[:4])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model.encode(texts, batch_tokens=10**9)
    whole = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(whole / 2 / total)
    try:
        embeddings = model.encode(texts, batch_tokens=10**9)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory: batch_tokens is" in caplog.text
    torch.testing.assert_close(embeddings[:4], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(embeddings, embeddings[:1].expand_as(embeddings), atol=1e-5, rtol=0)


def test_cached_gradients_are_those_of_the_whole_batch(checkpoint, sentences):
    from nvembed.train.collator import TripletCollator
    from nvembed.train.gradient_cache import embed_chunks
    from tests.train.test_gradient_cache import (
        adapted,
        assert_same,
        loss_and_gradients,
        triplets_of,
        with_all_activations,
    )

    model = adapted(checkpoint, dropout=0.1).cuda()
    batch = TripletCollator(model.tokenizer, model.config, 128, 1, chunk_tokens=100)(triplets_of(sentences))
    for key in ("query_index", "passage_index", "query_ids", "passage_ids"):
        batch[key] = batch[key].cuda()
    for chunk in batch["chunks"]:
        chunk.update({key: x.cuda() for key, x in chunk.items() if isinstance(x, torch.Tensor)})
    whole = loss_and_gradients(model, batch, with_all_activations)
    assert_same(whole, loss_and_gradients(model, batch, embed_chunks))


@pytest.fixture
def pairs_file(tmp_path, sentences):
    rows = [
        {"query": f"{name} {first[:25]}", "positive": f"{second} {name}", "instruction": "Complete"}
        for name in "ab"
        for first in sentences
        for second in sentences
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(script, checkpoint, pairs_file, output_dir, *options):
    """The losses of a run by the script, as a user starts it."""
    command = [
        sys.executable, ROOT / "train" / script, f"--model_name_or_path={checkpoint}", f"--datasets={pairs_file}",
        f"--output_dir={output_dir}", "--warmup_steps=0", "--num_negatives=2", "--logging_steps=1", "--max_steps=4",
        "--learning_rate=1e-2", "--per_device_train_batch_size=8", "--max_length=64", *options,
    ]  # fmt: skip
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = map(json.loads, (output_dir / LOG_FILE).read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_stage1_on_a_gpu_has_the_losses_of_a_cpu(tmp_path, checkpoint, pairs_file):
    plain = ["--lora_dropout=0", "--dtype=float32"]
    on_cpu = train("stage1.py", checkpoint, pairs_file, tmp_path / "cpu", *plain, "--use_cpu")
    on_gpu = train("stage1.py", checkpoint, pairs_file, tmp_path / "gpu", *plain)
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    options = ["--bf16", "--gradient_checkpointing", "--chunk_tokens=200"]
    in_bf16 = train("stage1.py", checkpoint, pairs_file, tmp_path / "bf16", "--lora_dropout=0", *options)
    assert in_bf16 == pytest.approx(on_cpu, rel=5e-2)
    losses = train("stage2.py", tmp_path / "bf16", pairs_file, tmp_path / "two", *options)
    assert len(losses) == 4 and all(map(math.isfinite, losses))


def test_a_resumed_run_on_a_gpu_takes_the_steps_that_it_would_have_taken(tmp_path, checkpoint, pairs_file):
    options = ["--bf16", "--lora_dropout=0.2", "--chunk_tokens=200", "--save_strategy=steps", "--save_steps=2"]
    whole = train("stage1.py", checkpoint, pairs_file, tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole" / "triplets", tmp_path / "again" / "triplets")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = train("stage1.py", checkpoint, pairs_file, tmp_path / "again", *options, "--resume_from_checkpoint=true")
    assert again[-2:] == pytest.approx(whole[-2:], rel=1e-5)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_qlora_trains_and_its_merged_checkpoint_embeds_alike(tmp_path, wide_checkpoint, pairs_file, sentences, bits):
    options = ["--bf16", "--dtype=bfloat16", "--gradient_checkpointing", f"--{bits}", "--lora_dropout=0"]
    losses = train("stage1.py", wide_checkpoint, pairs_file, tmp_path / "out", *options)
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    merged = NVEmbedModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).cuda()
    assert merged.encode(sentences).isfinite().all()


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_loaded_in_8_or_4_bits(wide_checkpoint, sentences, options):
    """bitsandbytes' kernels on the GPU, whose packed activations are `[tokens, hidden]`."""
    dense = NVEmbedModel.from_pretrained(wide_checkpoint, dtype=torch.bfloat16).cuda().encode(sentences)
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_type="nf4", **options)
    model = NVEmbedModel.from_pretrained(
        wide_checkpoint, dtype=torch.bfloat16, quantization_config=config, device_map={"": 0}
    )
    bar = 0.99 if "load_in_8bit" in options else 0.8  # NF4 rounds to 16 values
    assert torch.cosine_similarity(model.encode(sentences).float(), dense.float()).min() > bar


def test_embed_corpus_by_two_tasks_equals_encode(tmp_path, checkpoint, sentences):
    documents = [f"{i}: {sentence}" for i in range(20) for sentence in sentences]
    rows = [{"_id": str(i), "title": "", "text": text} for i, text in enumerate(documents)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable, ROOT / "eval" / "embed_corpus.py", "--model", checkpoint, "--corpus",
        tmp_path / "corpus.jsonl", "--output_dir", tmp_path / "vectors", "--tasks=2", "--shard_rows=50",
    ]  # fmt: skip
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-4000:]
    shards = VectorShards(tmp_path / "vectors")
    expected = NVEmbedModel.from_pretrained(checkpoint).cuda().encode(documents).cpu()
    vectors = torch.cat([torch.as_tensor(shard) for shard in shards.blocks()])
    torch.testing.assert_close(vectors, expected, atol=1e-4, rtol=0)


def test_a_mean_found_on_a_gpu_is_that_of_a_cpu(tmp_path, checkpoint, pairs_file):
    for device in ("cuda", "cpu"):
        options = {"datasets": [str(pairs_file)], "num_negatives": 0, "calibration_samples": 8, "device": device}
        center(CenterArguments(model_name_or_path=str(checkpoint), output_dir=str(tmp_path / device), **options))
    found, expected = (load_file(tmp_path / device / "model.safetensors") for device in ("cuda", "cpu"))
    (name,) = (name for name in expected if name.endswith("mean_embedding"))
    torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0)
