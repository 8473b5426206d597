"""The model that a student is distilled from: its states on the student's tokens, or its embeddings of the texts."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nvembed.eval.files import text_id, write_json
from nvembed.eval.models import LoadedModel
from nvembed.eval.vectors import MadeFrom, VectorShards, embed_shards
from nvembed.modeling_nvembed import NVEmbedModel, NVEmbedModelOutput
from nvembed.texts_nvembed import format_instruction
from nvembed.train.data.blend import Blend


OWN_INSTRUCTION = "(each text's own)"  # in the manifest of a cache


class StatesTeacher:
    """A checkpoint with the student's tokenizer, run on the student's batches: its states of every layer.

    Raises:
        ValueError: it reads texts as other tokens than the student, or its states are of another width.
    """

    def __init__(self, name: str, revision: str | None, student: NVEmbedModel):
        model = NVEmbedModel.from_pretrained(name, revision=revision, dtype="auto").eval().requires_grad_(False)
        ours, theirs = student.config, model.config
        if (
            model.tokenizer.get_vocab() != student.tokenizer.get_vocab()
            or ours.add_eos != theirs.add_eos
            or model.tokenizer("a b").input_ids != student.tokenizer("a b").input_ids
        ):
            raise ValueError(
                f"teacher {name} reads texts as other tokens than the student, so their states cannot be compared: set "
                "kd_losses to scores, embeddings or both"
            )
        if ours.text_config.hidden_size != theirs.text_config.hidden_size:
            raise ValueError(
                f"the states of teacher {name} are {theirs.text_config.hidden_size} wide and the student's "
                f"{ours.text_config.hidden_size}: set kd_losses to scores, embeddings or both"
            )
        if theirs.pooling_type == "latent_attention":
            model.fold_latent_attention()  # the same states, faster
        self.model = model
        self._last: tuple[int, NVEmbedModelOutput] | None = None

    @torch.no_grad()
    def run(self, chunk: dict) -> NVEmbedModelOutput:
        """Its output for a packed chunk, with the states of all layers; that of the last chunk asked for is kept."""
        if self._last is None or self._last[0] != id(chunk["input_ids"]):
            self.model.to(chunk["input_ids"].device)
            self._last = id(chunk["input_ids"]), self.model(**chunk, output_hidden_states=True)
        return self._last[1]

    def embed(self, batch: dict) -> Tensor:
        """Normalized embeddings of a batch's texts, `[texts, width]`."""
        return F.normalize(torch.cat([self.run(chunk).sentence_embeddings for chunk in batch["chunks"]]), dim=-1)


class EmbeddingTeacher:
    """Any model that `eval/run_mteb.py` measures, as it embeds the texts; computed as they come, or read from disk.

    Args:
        model: loaded with the student's `max_length`.
    """

    def __init__(self, model: LoadedModel):
        self.model, self.cache = model, None

    def read(self, cache: VectorShards) -> None:
        """Reads embeddings from a folder that `cache_embeddings` filled, from here on."""
        ids = np.array([int(name) for name in cache.ids()], dtype=np.int64)
        self.cache, self.order = cache, np.argsort(ids)
        self.ids = ids[self.order]

    def embed(self, batch: dict) -> Tensor:
        """Normalized embeddings of a batch's texts, fp32 `[texts, width]`.

        Raises:
            ValueError: a text is not in the cache.
        """
        device = batch["chunks"][0]["input_ids"].device
        if self.cache is None:
            return F.normalize(torch.from_numpy(embed_texts(self.model, batch["texts"])), dim=-1).to(device)
        wanted = np.array([pair_id(*pair) for pair in batch["texts"]], dtype=np.int64)
        places = np.searchsorted(self.ids, wanted).clip(max=len(self.ids) - 1)
        if (missing := np.flatnonzero(self.ids[places] != wanted)).size:
            raise ValueError(f"teacher_cache {self.cache.folder} has no {batch['texts'][missing[0]][1][:80]!r}")
        return F.normalize(torch.from_numpy(self.cache[self.order[places]]), dim=-1).to(device)


def prefix_for(model: LoadedModel, instruction: str) -> str:
    """What the teacher reads before a text that the student reads with `instruction`, formatted, or "" for none."""
    if model.prompts is None:
        return instruction
    return model.query_prefix("") if instruction else model.document_prefix()


def embed_texts(model: LoadedModel, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Embeddings of (instruction, text) pairs, fp32 `[pairs, width]`."""
    places: dict[str, list[int]] = {}
    for i, (instruction, _) in enumerate(pairs):
        places.setdefault(prefix_for(model, instruction), []).append(i)
    parts = {prefix: model.embed([pairs[i][1] for i in here], prefix) for prefix, here in places.items()}
    result = np.empty((len(pairs), next(iter(parts.values())).shape[1]), dtype=np.float32)
    for prefix, here in places.items():
        result[here] = parts[prefix]
    return result


def pair_id(instruction: str, text: str) -> int:
    return text_id(f"{instruction}\0{text}")


def pairs_of(blend: Blend, num_negatives: int) -> Iterator[tuple[str, str]]:
    """The distinct (instruction, text) pairs that a run over these tables can come by."""
    known = set()
    for table in blend.tables:
        for row in tqdm(table, desc="Texts for the teacher", leave=False):
            instruction = format_instruction(row["instruction"])
            on_passages = instruction if row["symmetric"] else ""
            passages = [row["positive"], *row["negatives"][:num_negatives]]
            for pair in ((instruction, row["query"]), *((on_passages, text) for text in passages)):
                if (number := pair_id(*pair)) not in known:
                    known.add(number)
                    yield pair


def cache_embeddings(folder: Path, model: LoadedModel, blend: Blend, num_negatives: int) -> None:
    """Embeds every text of a run once, into shards as `embed_corpus.py` writes them; continues where it stopped.

    Raises:
        ValueError: the folder was filled or begun by another teacher or revision, at another length, or for other
            texts.
    """
    pairs = list(pairs_of(blend, num_negatives))
    ids = [str(pair_id(*pair)) for pair in pairs]
    digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
    made_from = MadeFrom(model.name, model.revision, OWN_INSTRUCTION, model.max_length, digest)
    claim_cache(folder, asdict(made_from))
    embed_shards(lambda part, _: embed_texts(model, part), ids, pairs, folder, made_from)


def claim_cache(folder: Path, made_from: dict) -> None:
    """Marks a folder as this teacher's and these texts' before anything is in it.

    Raises:
        ValueError: it is another's.
    """
    file = folder / "made_from.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, made_from)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for name, value in made_from.items():
        if before.get(name) != value:
            raise ValueError(
                f"teacher_cache {folder} was made with {name} {before.get(name)!r}, and this run has {value!r}: name "
                "another folder, or remove it"
            )
