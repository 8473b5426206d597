"""Triplets to tensors: each distinct text once, packed without padding into chunks as `encode` packs its batches."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from nvembed.configuration_nvembed import NVEmbedConfig
from nvembed.eval.files import text_id
from nvembed.texts_nvembed import format_instruction, length_sorted_batches, pack, tokenize
from nvembed.train.losses import NO_CLASS, NO_TEXT


@dataclass(frozen=True)
class BatchText:
    """A text as the model reads it, and whether it is a query, which other models may read otherwise."""

    instruction: str  # formatted
    text: str
    is_query: bool


@dataclass
class TripletCollator:
    """Makes one training batch of triplets.

    The batch is `{"chunks": [...], "query_index": ..., "passage_index": ..., "query_ids": ..., "passage_ids": ...,
    "classes": ..., "datasets": [...], "false_negatives": ..., "texts": [...]}`: `chunks` are packed texts for the
    model (see `nvembed.texts_nvembed.pack`), queries, positives and negatives alike, the longest in the last. Of their
    embeddings, concatenated in order, `query_index[i]` is the query of row i and `passage_index[i, j]` its j-th
    passage, the positive first. Where a row has fewer than `num_negatives` negatives, the empty slots have the id
    `NO_TEXT` and index 0. `classes[i]` are the ids of row i's data set and of its class there or `NO_CLASS`;
    `datasets[i]` is its data set; `texts` are the `BatchText`s in the order of the embeddings.

    Args:
        tokenizer: the checkpoint's.
        config: the checkpoint's; it says whether instructions are masked and `</s>` is appended to the text.
        max_length: tokens of a text with its instruction.
        num_negatives: hard negatives per row; a triplet with more gives its first ones, the hardest if mined.
        chunk_tokens: at most this many tokens per chunk (a longer text gets its own chunk); None: one chunk.
        false_negative_margin: leave out hard negatives that the data's teacher scored at least the positive's score
            plus this; `false_negatives[i]` says how many of row i. None: off.

    Raises:
        ValueError: `max_length` exceeds the decoder's positions.
    """

    tokenizer: PreTrainedTokenizerFast
    config: NVEmbedConfig
    max_length: int = 512
    num_negatives: int = 7
    chunk_tokens: int | None = None
    false_negative_margin: float | None = None

    def __post_init__(self):
        positions = self.config.text_config.max_position_embeddings
        if self.max_length > positions:
            raise ValueError(
                f"max_length is {self.max_length} and the decoder has {positions} positions "
                f"(max_position_embeddings); set max_length: {positions} or less"
            )

    def __call__(self, triplets: list[dict]) -> dict:
        position: dict[tuple[str, str], int] = {}  # (instruction, text) -> its place among the batch's texts
        distinct: list[BatchText] = []

        def place(text: BatchText) -> int:
            key = text.instruction, text.text
            if key not in position:
                position[key] = len(position)
                distinct.append(text)
            return position[key]

        queries, passages, query_ids, passage_ids, false_negatives = [], [], [], [], []
        for triplet in triplets:
            true_negatives = self._true_negatives(triplet)
            false_negatives.append(len(triplet["negatives"]) - len(true_negatives))
            query, *others = self.texts_of(triplet)
            empty = self.num_negatives + 1 - len(others)
            queries.append(place(query))
            query_ids.append(text_id(query.text))
            passages.append([place(other) for other in others] + [0] * empty)
            passage_ids.append([text_id(other.text) for other in others] + [NO_TEXT] * empty)

        instructions, texts = zip(*position)
        tokenized = tokenize(self.tokenizer, self.config, list(texts), list(instructions), self.max_length)
        lengths = [len(text.input_ids) for text in tokenized]
        # The chunk that is not full comes first: the last one is embedded once, the others twice (see gradient_cache).
        chunks = list(length_sorted_batches(lengths, self.chunk_tokens or sum(lengths)))[::-1]
        rank_of = torch.empty(len(tokenized), dtype=torch.long)  # place in `position` -> row of the embeddings
        rank_of[[i for chunk in chunks for i in chunk]] = torch.arange(len(tokenized))
        return {
            "chunks": [pack([tokenized[i] for i in chunk]) for chunk in chunks],
            "query_index": rank_of[torch.tensor(queries)],
            "passage_index": rank_of[torch.tensor(passages)],
            "query_ids": torch.tensor(query_ids),
            "passage_ids": torch.tensor(passage_ids),
            "classes": torch.tensor([class_ids(triplet) for triplet in triplets]),
            "datasets": [triplet["dataset"] for triplet in triplets],
            "false_negatives": torch.tensor(false_negatives),
            "texts": [distinct[i] for chunk in chunks for i in chunk],
        }

    def texts_of(self, triplet: dict) -> list[BatchText]:
        """The query of a triplet, its positive, and the negatives that are trained on."""
        instruction = format_instruction(triplet["instruction"])
        on_passages = instruction if triplet["symmetric"] else ""
        passages = [triplet["positive"], *self._true_negatives(triplet)[: self.num_negatives]]
        return [BatchText(instruction, triplet["query"], True), *(BatchText(on_passages, p, False) for p in passages)]

    def _true_negatives(self, triplet: dict) -> list[str]:
        """The negatives that the teacher, if the triplet has its scores, put clearly below the positive."""
        negatives, scores, positive = (triplet.get(key) for key in ("negatives", "negative_scores", "positive_score"))
        if self.false_negative_margin is None or scores is None or positive is None:
            return negatives
        limit = positive + self.false_negative_margin
        return [text for text, score in zip(negatives, scores, strict=True) if score < limit]


def class_ids(triplet: dict) -> tuple[int, int]:
    """The ids of a triplet's data set and of its class there."""
    dataset, name = triplet["dataset"], triplet.get("class")
    return text_id(dataset), NO_CLASS if name is None else text_id(f"{dataset}\0{name}")
