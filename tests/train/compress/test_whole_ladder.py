"""Zeros through pruning, distillation, merging and quantization, in the formats on disk."""

import pytest
import torch
from peft import PeftModel

from nvembed import NVEmbedModel
from nvembed.train.adapter import add_adapter
from nvembed.train.arguments import ModelArguments
from nvembed.train.checkpoints import write_checkpoint
from nvembed.train.collator import TripletCollator
from nvembed.train.compress.checkpoint import load_uncompressed
from nvembed.train.compress.prune import PruneArguments, prune
from nvembed.train.compress.quantize import QuantizeArguments, quantize
from nvembed.train.compress.sparsity import Pattern, decoder_matrices
from nvembed.train.data.source import DatasetSource
from nvembed.train.distill_arguments import DistillArguments
from nvembed.train.distillation import prepare_distillation
from nvembed.train.trainer import EmbeddingTrainer
from tests.conftest import SENTENCES, randomize
from tests.triplets import prepare, write_jsonl


@pytest.mark.parametrize(("pattern", "use_peft"), [("2:4", True), ("4:8", True), ("2:4", False)])
def test_a_pattern_holds_from_pruning_to_int8(checkpoint, tmp_path, pattern, use_peft):
    teacher = NVEmbedModel.from_pretrained(checkpoint)
    randomize(teacher.latent_attention_model)
    teacher.save_pretrained(tmp_path / "dense")
    rows = [{"query": t, "positive": t.lower(), "negatives": [SENTENCES[i - 1]]} for i, t in enumerate(SENTENCES)]
    sources = [DatasetSource(write_jsonl(tmp_path / "rows.jsonl", rows), instruction="Find it")]
    options = {"datasets": sources, "calibration_samples": 8, "device": "cpu"}
    held = Pattern.parse(pattern)

    asked = PruneArguments(
        model_name_or_path=str(tmp_path / "dense"), output_dir="unused", method="sparsegpt", pattern=pattern,
        drop_latent_attention=True, **options,
    )  # fmt: skip
    model = load_uncompressed(str(tmp_path / "dense"), None, "prune")
    prune(asked, model)
    write_checkpoint(model, str(tmp_path / "pruned"))

    student = NVEmbedModel.from_pretrained(tmp_path / "pruned")
    args = DistillArguments(
        str(tmp_path / "distilled"), teacher=str(tmp_path / "dense"), per_device_train_batch_size=4, max_steps=3,
        learning_rate=0.02, warmup_steps=0, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    distillation = prepare_distillation(args, student, 32)
    adapted = add_adapter(student, ModelArguments(model_name_or_path="x", use_peft=use_peft, lora_dropout=0.0))
    assert isinstance(adapted, PeftModel) == use_peft
    trainer = EmbeddingTrainer(
        model=adapted,
        args=args,
        train_dataset=prepare(sources, 1),
        distillation=distillation,
        data_collator=TripletCollator(student.tokenizer, student.config, 32, 1),
    )
    trainer.train()
    trained = student.eval().encode(SENTENCES)
    trainer.save_merged()
    before = {name: m.weight for name, m in decoder_matrices(model.embedding_model).items()}
    distilled = load_uncompressed(str(tmp_path / "distilled"), None, "quantize")
    assert torch.allclose(distilled.encode(SENTENCES), trained, atol=1e-5)
    for name, module in decoder_matrices(distilled.embedding_model).items():
        assert held.holds(module.weight) and not torch.equal(module.weight, before[name])

    for rounding in ("nearest", "gptq"):
        again = load_uncompressed(str(tmp_path / "distilled"), None, "quantize")
        quantize(QuantizeArguments(model_name_or_path="x", output_dir="x", rounding=rounding, **options), again)
        write_checkpoint(again, str(tmp_path / rounding))
        loaded = NVEmbedModel.from_pretrained(tmp_path / rounding)
        for module in decoder_matrices(loaded.embedding_model).values():
            assert held.holds(module.weight.dequantize())
        assert (torch.cosine_similarity(loaded.encode(SENTENCES), trained) > 0.999).all()
