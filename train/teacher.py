"""The model that a student is distilled from: its states on the student's tokens, or its embeddings of the texts."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nvembed.eval.files import text_id, write_json
from nvembed.eval.models import LoadedModel
from nvembed.eval.vectors import MadeFrom, VectorShards, embed_shards, is_finished
from nvembed.modeling_nvembed import NVEmbedModel, NVEmbedModelOutput
from nvembed.texts_nvembed import format_instruction
from nvembed.train.collator import BatchText, TripletCollator
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
                f"{ours.text_config.hidden_size}: leave states out of kd_losses"
            )
        if theirs.pooling_type == "latent_attention":
            model.fold_latent_attention()  # the same states, faster
        self.model = model
        self._last: tuple[Tensor, NVEmbedModelOutput] | None = None  # token ids of a chunk, and what was made of them

    @torch.no_grad()
    def run(self, chunk: dict) -> NVEmbedModelOutput:
        """Its output for a packed chunk, with the states of all layers; that of the last chunk asked for is kept."""
        if self._last is None or self._last[0] is not chunk["input_ids"]:
            self.model.to(chunk["input_ids"].device)
            self._last = chunk["input_ids"], self.model(**chunk, output_hidden_states=True)
        return self._last[1]

    def embed(self, batch: dict) -> Tensor:
        """Normalized embeddings of a batch's texts, `[texts, width]`."""
        return F.normalize(torch.cat([self.run(chunk).sentence_embeddings for chunk in batch["chunks"]]), dim=-1)


class EmbeddingTeacher:
    """Any model that `eval/run_mteb.py` measures, as it embeds the texts; computed as they come, or read from disk.

    Args:
        model: loaded with the student's `max_length`.
        instruction: task definition that a model with instructions reads where a task has one; None: the student's.
    """

    def __init__(self, model: LoadedModel, instruction: str | None = None):
        self.model, self.instruction, self.cache = model, instruction, None

    def read(self, folder: Path) -> None:
        """Reads embeddings from a folder that `cache_embeddings` filled, from here on."""
        self.cache, self.parts = folder, finished_parts(folder)
        self.starts = np.cumsum([0, *map(len, self.parts)])  # position of each part's first row
        ids = np.array([int(name) for part in self.parts for name in part.ids()], dtype=np.int64)
        self.order = np.argsort(ids)
        self.ids = ids[self.order]

    def embed(self, batch: dict) -> Tensor:
        """Normalized embeddings of a batch's texts, fp32 `[texts, width]`.

        Raises:
            ValueError: a text is not in the cache.
        """
        device = batch["chunks"][0]["input_ids"].device
        embeddings = self.embed_texts(batch["texts"]) if self.cache is None else self._look_up(batch["texts"])
        return F.normalize(torch.from_numpy(embeddings), dim=-1).to(device)

    def _look_up(self, texts: Sequence[BatchText]) -> np.ndarray:
        wanted = np.array([cache_id(text) for text in texts], dtype=np.int64)
        places = np.searchsorted(self.ids, wanted).clip(max=len(self.ids) - 1)
        if (missing := np.flatnonzero(self.ids[places] != wanted)).size:
            raise ValueError(f"teacher_cache {self.cache} has no {texts[missing[0]].text[:80]!r}")
        rows = self.order[places]
        result = np.empty((len(texts), self.parts[0].width), dtype=np.float32)
        for part, start in zip(self.parts, self.starts):
            here = (start <= rows) & (rows < start + len(part))
            if here.any():
                result[here] = part[rows[here] - start]
        return result

    def prefix(self, text: BatchText) -> str:
        """What the teacher reads before a text: its own prompt for its role, or the instruction."""
        if self.model.prompts is not None:
            return self.model.query_prefix("") if text.is_query else self.model.document_prefix()
        if self.instruction is not None and (text.is_query or text.instruction):
            return format_instruction(self.instruction)
        return text.instruction

    def embed_texts(self, texts: Sequence[BatchText]) -> np.ndarray:
        """Embeddings as the teacher gives them, fp32 `[texts, width]`."""
        places: dict[str, list[int]] = {}
        for i, text in enumerate(texts):
            places.setdefault(self.prefix(text), []).append(i)
        parts = {prefix: self.model.embed([texts[i].text for i in here], prefix) for prefix, here in places.items()}
        result = np.empty((len(texts), next(iter(parts.values())).shape[1]), dtype=np.float32)
        for prefix, here in places.items():
            result[here] = parts[prefix]
        return result


def cache_id(text: BatchText) -> int:
    return text_id(f"{'query' if text.is_query else 'passage'}\0{text.instruction}\0{text.text}")


def texts_of_run(blend: Blend, collator: TripletCollator) -> Iterator[BatchText]:
    """The distinct texts that a run over these tables can come by."""
    known = set()
    for table in blend.tables:
        for row in tqdm(table, desc="Texts for the teacher", leave=False):
            for text in collator.texts_of(row):
                if (number := cache_id(text)) not in known:
                    known.add(number)
                    yield text


def cache_embeddings(folder: Path, teacher: EmbeddingTeacher, blend: Blend, collator: TripletCollator) -> None:
    """Embeds every text of a run that no earlier run has had embedded; continues where it stopped.

    Each run's are a part of the folder, shards as `embed_corpus.py` writes them.

    Raises:
        ValueError: the folder was filled or begun by another teacher or revision, with another instruction, or at
            another length.
    """
    model = teacher.model
    instruction = OWN_INSTRUCTION if teacher.instruction is None else teacher.instruction
    settings = {
        "model": model.name, "revision": model.revision, "instruction": instruction, "max_length": model.max_length,
    }  # fmt: skip
    claim_cache(folder, settings)
    known = {name for part in finished_parts(folder) for name in part.ids()}
    missing = [text for text in texts_of_run(blend, collator) if str(cache_id(text)) not in known]
    if missing:
        ids = [str(cache_id(text)) for text in missing]
        digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
        made_from = MadeFrom(**settings, texts=digest)
        embed_shards(lambda part, _: teacher.embed_texts(part), ids, missing, folder / digest, made_from)


def finished_parts(folder: Path) -> list[VectorShards]:
    return [VectorShards(part) for part in sorted(folder.iterdir()) if part.is_dir() and is_finished(part)]


def claim_cache(folder: Path, settings: dict) -> None:
    """Marks a folder as this teacher's, read with these settings, before anything is in it.

    Raises:
        ValueError: it is another's.
    """
    file = folder / "made_from.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"teacher_cache {folder} was made with {name} {before.get(name)!r}, and this run has {value!r}: name "
                "another folder, or remove it"
            )
