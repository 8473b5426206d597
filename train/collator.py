"""Triplets -> tensors: one text is tokenized once, texts of similar length share a padded group."""

import hashlib
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from nvembed.configuration_nvembed import NVEmbedConfig
from nvembed.modeling_nvembed import format_instruction, pad, tokenize
from nvembed.train.losses import NO_TEXT


def text_id(text: str) -> int:
    """A non-negative 63-bit identity, the same in every process (Python's own `hash` is salted per process)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass
class TripletCollator:
    """Makes one training batch of triplets.

    The batch is `{"groups": [...], "query_index": ..., "passage_index": ..., "query_ids": ..., "passage_ids": ...}`:
    `groups` are padded tensors for the model (see `nvembed.modeling_nvembed.pad`), whose embeddings, concatenated in
    order, hold the query of row i at `query_index[i]` and its j-th passage at `passage_index[i, j]`, the positive
    first. A row with fewer than `num_negatives` negatives has identity `NO_TEXT` (and index 0) in the empty slots.

    Args:
        tokenizer: the checkpoint's.
        config: the checkpoint's; it says how an instruction is masked and who appends `</s>`.
        max_length: tokens of a text with its instruction.
        num_negatives: hard negatives of a row; a triplet with more gives its first, the hardest if they are mined.
        num_groups: padded groups per batch. A constant number, so that every process makes as many forward calls.
    """

    tokenizer: PreTrainedTokenizerFast
    config: NVEmbedConfig
    max_length: int = 512
    num_negatives: int = 7
    num_groups: int = 4

    def __call__(self, triplets: list[dict]) -> dict:
        position: dict[tuple[str, str], int] = {}  # (instruction, text) -> its place among the batch's texts

        def place(instruction: str, text: str) -> int:
            return position.setdefault((instruction, text), len(position))

        queries, passages, query_ids, passage_ids = [], [], [], []
        for triplet in triplets:
            instruction = format_instruction(triplet["instruction"])
            on_passages = instruction if triplet["symmetric"] else ""
            negatives = triplet["negatives"][: self.num_negatives]
            texts = [triplet["positive"], *negatives]
            empty = self.num_negatives - len(negatives)
            queries.append(place(instruction, triplet["query"]))
            query_ids.append(text_id(triplet["query"]))
            passages.append([place(on_passages, text) for text in texts] + [0] * empty)
            passage_ids.append([text_id(text) for text in texts] + [NO_TEXT] * empty)

        instructions, texts = zip(*position)
        tokenized = tokenize(self.tokenizer, self.config, list(texts), list(instructions), self.max_length)
        by_length = sorted(range(len(tokenized)), key=lambda i: len(tokenized[i].input_ids))
        bounds = [len(by_length) * i // self.num_groups for i in range(self.num_groups + 1)]
        groups = [by_length[start:end] for start, end in zip(bounds, bounds[1:]) if end > start]
        rank_of = torch.empty(len(tokenized), dtype=torch.long)  # place in `position` -> row of the embeddings
        rank_of[by_length] = torch.arange(len(tokenized))
        return {
            "groups": [pad([tokenized[i] for i in group], self.tokenizer.pad_token_id) for group in groups],
            "query_index": rank_of[torch.tensor(queries)],
            "passage_index": rank_of[torch.tensor(passages)],
            "query_ids": torch.tensor(query_ids),
            "passage_ids": torch.tensor(passage_ids),
        }
