"""The encoder that mteb calls to embed a task's texts."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType

from nvembed.eval.models import LoadedModel, scaled_to_1
from nvembed.eval.processes import Embed
from nvembed.eval.spread import effective_rank, mean_cosine
from nvembed.eval.tasks.instructions import TaskInstruction
from nvembed.texts_nvembed import format_instruction


SPREAD_TEXTS = 1000  # of which mean cosine and effective rank are taken


class TaskEncoder(AbsEncoder):
    """Collects a task's texts, looks up their instruction and embeds them; the interface is mteb's.

    `texts` tells of each task how many texts were embedded and how many of them cut at `max_length`, and how much those
    that came first, of retrieval the first documents, crowd: `mean_cosine` and `effective_rank`.

    Args:
        instructions: task name -> instruction.
        keep: called with `texts` whenever more is known, which is before mteb has a task's result: a run that is killed
            has both or neither.
    """

    def __init__(
        self,
        model: LoadedModel,
        embed: Embed,
        instructions: Mapping[str, TaskInstruction],
        keep: Callable[[dict], object] | None = None,
    ):
        self.prompts, self.embed, self.instructions = model.prompts, embed, instructions
        self.model = model
        self.texts: dict[str, dict[str, float]] = {}  # what is known of each task's, by name
        self.described: dict[str, PromptType | None] = {}  # task -> which of its texts `describe_spread` has seen
        self.keep = keep
        overwrites = {"name": model.name, "revision": model.revision, "similarity_fn_name": model.similarity}
        self.mteb_model_meta = ModelMeta.create_empty(overwrites)

    def encode(
        self,
        inputs,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **options,
    ) -> np.ndarray:
        """Embeddings `[texts, width]` of the texts in one of mteb's `DataLoader`s; equal texts are embedded once."""
        texts = [text for batch in inputs for text in batch["text"]]
        unique = {text: position for position, text in enumerate(dict.fromkeys(texts))}
        prefix = self.prefix(task_metadata, prompt_type)
        embeddings = self.embed(list(unique), prefix)
        name = task_metadata.name
        known = self.texts.setdefault(name, {"texts": 0, "cut": 0})
        is_document = prompt_type is PromptType.document  # of retrieval, queries come first
        if name not in self.described or is_document and self.described[name] is not PromptType.document:
            known |= describe_spread(embeddings)
            self.described[name] = prompt_type
        known["texts"] += len(unique)
        cut = self.count_cut(list(unique), prefix)
        known["cut"] = None if cut is None or known["cut"] is None else known["cut"] + cut
        if self.keep is not None:
            self.keep(self.texts)
        return embeddings[[unique[text] for text in texts]]

    def count_cut(self, texts: list[str], prefix: str) -> int | None:
        """How many texts the model cuts at its `max_length`; None: not known."""
        return None if self.model.count_cut is None else self.model.count_cut(texts, prefix)

    def prefix(self, task_metadata: TaskMetadata, prompt_type: PromptType | None) -> str:
        """The instruction for queries or documents of a task, formatted as the model reads it."""
        if self.prompts is not None:
            return self.prompts.get(get_prompt_name(self.prompts, task_metadata, prompt_type) or "default", "")
        instruction = self.instructions[task_metadata.name]
        return format_instruction(instruction.document if prompt_type is PromptType.document else instruction.query)


def describe_spread(embeddings: np.ndarray) -> dict[str, float]:
    """How much embeddings `[texts, width]` crowd; of more than `SPREAD_TEXTS`, of a fixed choice."""
    chosen = np.random.default_rng(0).permutation(len(embeddings))[:SPREAD_TEXTS]
    vectors = torch.from_numpy(scaled_to_1(embeddings[chosen].astype(np.float32)))
    if len(vectors) < 2:
        return {}
    return {"mean_cosine": round(mean_cosine(vectors), 4), "effective_rank": round(effective_rank(vectors), 1)}


QUERY = "\0query\0"  # begins the prefix of what another model embeds; no text has such characters


class AsymmetricEncoder(TaskEncoder):
    """A `TaskEncoder` whose queries are for another model than its documents: to be used with `routed`."""

    def __init__(
        self,
        documents: LoadedModel,
        queries: LoadedModel,
        embed: Embed,
        instructions: Mapping[str, TaskInstruction],
        keep: Callable[[dict], object] | None = None,
    ):
        super().__init__(documents, embed, instructions, keep)
        self.of_queries = TaskEncoder(queries, embed, instructions)

    def prefix(self, task_metadata: TaskMetadata, prompt_type: PromptType | None) -> str:
        if prompt_type is PromptType.query:
            return QUERY + self.of_queries.prefix(task_metadata, prompt_type)
        return super().prefix(task_metadata, prompt_type)

    def count_cut(self, texts: list[str], prefix: str) -> int | None:
        if prefix.startswith(QUERY):
            return self.of_queries.count_cut(texts, prefix.removeprefix(QUERY))
        return super().count_cut(texts, prefix)


def routed(documents: LoadedModel, queries: LoadedModel) -> Embed:
    """An `Embed` that gives an `AsymmetricEncoder`'s texts to the model they are for.

    Raises:
        ValueError: their embeddings are of different widths, so they are not of one space.
    """
    widths = [model.embed(["one text"], "").shape[1] for model in (documents, queries)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"{documents.name} gives embeddings of {widths[0]} dimensions and query_model {queries.name} of "
            f"{widths[1]}: it must be trained into the other's space (train/distill.py, kd_losses: embeddings)"
        )

    def embed(texts: list[str], prefix: str) -> np.ndarray:
        if prefix.startswith(QUERY):
            return queries.embed(texts, prefix.removeprefix(QUERY))
        return documents.embed(texts, prefix)

    return embed
