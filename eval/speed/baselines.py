"""The two training steps that `eval/speed/train.py` compares with ours, written as a user would write them.

python eval/speed/baselines.py padded job.json
python eval/speed/baselines.py sentence-transformers job.json

A job is what `eval/speed/train.py` writes: folders of the weights and the triplets, and the settings of a step.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from transformers import Trainer, TrainingArguments

from nvembed import NVEmbedModel
from nvembed.eval.log_history import LogHistory
from nvembed.texts_nvembed import format_instruction, pad, tokenize


def read_triplets(job: dict) -> list[dict]:
    with open(job["data"], encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def lora(job: dict, **options) -> LoraConfig:
    return LoraConfig(
        r=job["lora_r"], lora_alpha=job["lora_alpha"], lora_dropout=0.0, target_modules=job["lora_modules"], **options
    )


# --- The padded step


class PaddedTrainer(Trainer):
    """InfoNCE with in-batch negatives; all queries in one call, then all positives, then all hard negatives."""

    def __init__(self, *args, temperature: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = temperature

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        queries, *passages = (model(**part).sentence_embeddings for part in inputs["parts"])
        similarity = queries @ torch.cat(passages).T  # the positives come first, in the order of the queries
        target = torch.arange(len(queries), device=similarity.device)
        return F.cross_entropy(similarity / self.temperature, target)


def padded(job: dict) -> None:
    model = NVEmbedModel.from_pretrained(job["model"], dtype=job["dtype"])
    tokenizer, config = model.tokenizer, model.config
    pooling = ["latent_attention_model"] if any(True for _ in model.latent_attention_model.parameters()) else None
    model.latent_attention_model.float()  # as ours: trained in full, in fp32
    instruction = format_instruction(job["instruction"])

    def collate(triplets: list[dict]) -> dict:
        parts = [
            ([triplet["query"] for triplet in triplets], instruction),
            ([triplet["positive"] for triplet in triplets], ""),
            ([text for triplet in triplets for text in triplet["negatives"]], ""),
        ]
        tokenized = [
            tokenize(tokenizer, config, texts, [prefix] * len(texts), job["max_length"])
            for texts, prefix in parts
            if texts
        ]
        return {"parts": [pad(texts, tokenizer.pad_token_id) for texts in tokenized]}

    PaddedTrainer(
        model=get_peft_model(model, lora(job, modules_to_save=pooling)),
        args=TrainingArguments(**job["trainer"], remove_unused_columns=False),
        train_dataset=read_triplets(job),
        data_collator=collate,
        temperature=job["temperature"],
        callbacks=[LogHistory()],
    ).train()


# --- sentence-transformers


def sentence_transformers(job: dict) -> None:
    transformer = Transformer(
        job["decoder"], model_kwargs={"dtype": getattr(torch, job["dtype"])}, max_seq_length=job["max_length"]
    )
    pooling = Pooling(transformer.get_embedding_dimension(), "mean", include_prompt=False)
    device = "cpu" if job["trainer"]["use_cpu"] else "cuda"
    model = SentenceTransformer(modules=[transformer, pooling], device=device)
    model.add_adapter(lora(job))
    rows = [
        {key: row[key] for key in ("query", "positive")}
        | {f"negative_{i}": text for i, text in enumerate(row["negatives"], start=1)}
        for row in read_triplets(job)
    ]
    SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            **job["trainer"], prompts={"query": format_instruction(job["instruction"])}
        ),
        train_dataset=Dataset.from_list(rows),
        loss=CachedMultipleNegativesRankingLoss(
            model, scale=1 / job["temperature"], mini_batch_size=job["mini_batch_size"]
        ),
        callbacks=[LogHistory()],
    ).train()


if __name__ == "__main__":
    way, path = sys.argv[1:]
    {"padded": padded, "sentence-transformers": sentence_transformers}[way](json.loads(Path(path).read_text()))
