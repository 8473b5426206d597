"""The model that a student is distilled from: its states on the student's tokens, or its embeddings of the texts."""

import hashlib
import json
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import get_logger

from nvembed.eval.files import locked, text_id, write_json
from nvembed.eval.models import LoadedModel
from nvembed.eval.vectors import SHARD_ROWS, MadeFrom, VectorShards, embed_shards, is_finished
from nvembed.modeling_nvembed import NVEmbedModel, NVEmbedModelOutput
from nvembed.texts_nvembed import format_instruction
from nvembed.train.collator import BatchText, TripletCollator
from nvembed.train.data.blend import Blend


logger = get_logger(__name__)

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
        self.model, self.instruction = model, instruction
        self.cache: TeacherCache | None = None  # None: every text is embedded as it comes

    def embed(self, batch: dict) -> Tensor:
        """Normalized embeddings of a batch's texts, fp32 `[texts, width]`.

        Raises:
            ValueError: as `TeacherCache.look_up`.
        """
        device = batch["chunks"][0]["input_ids"].device
        embed = self.embed_texts if self.cache is None else self.cache.look_up
        return F.normalize(torch.from_numpy(embed(batch["texts"])), dim=-1).to(device)

    def prefix(self, text: BatchText) -> str:
        """What the teacher reads before a text: its own prompt for its role, or the instruction."""
        if self.model.prompts is not None:
            return self.model.query_prefix("") if text.is_query else self.model.document_prefix()
        if self.instruction is not None and (text.is_query or text.instruction):
            return format_instruction(self.instruction)
        return text.instruction

    @property
    def settings(self) -> dict:
        """What its embeddings follow from, but for the texts: fields of `MadeFrom`."""
        instruction = OWN_INSTRUCTION if self.instruction is None else self.instruction
        return {
            "model": self.model.name, "revision": self.model.revision, "instruction": instruction,
            "max_length": self.model.max_length,
        }  # fmt: skip

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


class TeacherCache:
    """A teacher's embeddings in a folder: of one run's texts, and of what further runs have added to them.

    Each run's new texts are subfolders of shards as `embed_corpus.py` writes them. Concurrent runs take turns filling
    it.

    Args:
        settings: `EmbeddingTeacher.settings`; the folder is marked as theirs before anything is in it.

    Raises:
        ValueError: the folder was filled or begun by another teacher or revision, with another instruction, or at
            another length.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings = folder, settings
        self._claim()
        self.load()

    def load(self) -> None:
        """Reads which texts the folder has."""
        folders = [self.folder, *sorted(path for path in self.folder.iterdir() if path.is_dir())]
        self.parts = [VectorShards(folder) for folder in folders if is_finished(folder)]
        for part in self.parts:
            self._check(part.folder, asdict(part.made_from))
        self.starts = np.cumsum([0, *map(len, self.parts)])  # position of each part's first row
        ids = np.array([int(name) for part in self.parts for name in part.ids()], dtype=np.int64)
        self.order = np.argsort(ids)
        self.ids = ids[self.order]

    def fill(self, teacher: EmbeddingTeacher, texts: Iterable[BatchText]) -> None:
        """Embeds the texts that the folder lacks; stopped, it has kept all but the last `SHARD_ROWS`."""
        known = set(self.ids.tolist())
        missing = {number: text for text in texts if (number := cache_id(text)) not in known}
        if not missing:
            return
        with self._turn():
            self.load()  # what another run has added meanwhile
            known = set(self.ids.tolist())
            rows = [(number, text) for number, text in missing.items() if number not in known]
            for start in range(0, len(rows), SHARD_ROWS):
                ids, here = zip(*((str(number), text) for number, text in rows[start : start + SHARD_ROWS]))
                digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
                made_from = MadeFrom(**self.settings, texts=digest)
                embed_shards(lambda part, _: teacher.embed_texts(part), ids, here, self.folder / digest, made_from)
            self.load()

    def look_up(self, texts: Sequence[BatchText]) -> np.ndarray:
        """Embeddings as the teacher gives them, fp32 `[texts, width]`.

        Raises:
            ValueError: a text is not in the cache.
        """
        wanted = np.array([cache_id(text) for text in texts], dtype=np.int64)
        places = np.searchsorted(self.ids, wanted)
        if (missing := np.flatnonzero(places == np.searchsorted(self.ids, wanted, side="right"))).size:
            raise ValueError(
                f"teacher_cache {self.folder} on {socket.gethostname()} has no {texts[missing[0]].text[:80]!r}: it "
                "must be on a disk that all machines share with the main process's, which fills it"
            )
        rows = self.order[places]
        result = np.empty((len(texts), self.parts[0].width), dtype=np.float32)
        for part, start in zip(self.parts, self.starts):
            here = (start <= rows) & (rows < start + len(part))
            result[here] = part[rows[here] - start]
        return result

    def _turn(self) -> AbstractContextManager[None]:
        return locked(self.folder, lambda: logger.warning(f"waiting for another run, which is filling {self.folder}"))

    def _claim(self) -> None:
        file = self.folder / "made_from.json"
        if not file.is_file():
            with self._turn():
                if not file.is_file():
                    write_json(file, self.settings)
        self._check(self.folder, json.loads(file.read_text(encoding="utf-8")))

    def _check(self, folder: Path, made_from: Mapping) -> None:
        for name, value in self.settings.items():
            if made_from.get(name) != value:
                raise ValueError(
                    f"teacher_cache: {folder} was made with {name} {made_from.get(name)!r}, and this run has "
                    f"{value!r}: name another folder, or remove {folder}"
                )
