"""Models as mteb sees them: checkpoints of ours with a task's instruction, any sentence-transformers model as it is."""

import gc
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub import constants
from mteb.models.model_meta import ScoringFunction
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from nvembed.eval.files import digest_files
from nvembed.eval.processes import Embed
from nvembed.modeling_nvembed import NVEmbedModel, find_base_of_adapter
from nvembed.texts_nvembed import format_instruction


logger = logging.getLogger(__name__)

MAX_LENGTH = 512  # tokens of a text with its instruction (paper section 5.1)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to embed.

    Args:
        name: used in results; the last two parts of a folder's path, or the Hub name.
        revision: the Hub's commit, or a digest of a folder's files.
        embed: (texts, prefix) -> fp32 `[texts, width]`; the prefix is an instruction as the model reads it.
        max_length: at most this many tokens of a text with its instruction.
        similarity: the one it was trained for, cosine or dot product.
        prompts: the model's own prompts by name, used instead of the tasks' instructions; None: use the instructions.
        count_cut: (texts, prefix) -> how many are longer than `max_length` and are cut there; None: not known.
    """

    name: str
    revision: str
    embed: Embed
    max_length: int = MAX_LENGTH
    similarity: ScoringFunction = ScoringFunction.COSINE
    prompts: dict[str, str] | None = None
    count_cut: Callable[[list[str], str], int] | None = None

    @property
    def embed_for_search(self) -> Embed:
        """An `Embed` whose dot products are the similarity that the model was trained for."""
        return self.embed if self.similarity is ScoringFunction.DOT_PRODUCT else normalized(self.embed)

    def query_prefix(self, instruction: str) -> str:
        """What goes before a query: the model's own prompt, or else the instruction as the model reads it."""
        if self.prompts is not None:
            return self.prompts.get("query", self.prompts["default"])
        return format_instruction(instruction)

    def document_prefix(self, instruction: str = "") -> str:
        """What goes before a document: as for queries; documents have an instruction in symmetric tasks only."""
        if self.prompts is not None:
            return self.prompts.get("document", self.prompts["default"])
        return format_instruction(instruction)

    def check_reads(
        self, option: str, instruction: str, way_out: str = "add --instruct, so that it does, or leave it out"
    ) -> None:
        """Raises a `ValueError` if the model would not read an instruction: it has prompts instead, or nothing."""
        if self.prompts is not None:
            raise ValueError(
                f"{option} is {instruction!r}, which {self.name} would not read: a sentence-transformers model gets "
                f"its own prompts, if it has any; {way_out}"
            )


def free_gpu_memory() -> None:
    """Gives back what models that were let go held on GPUs; torch keeps it for this process otherwise."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def load_model(
    model: str,
    revision: str | None = None,
    max_length: int = MAX_LENGTH,
    batch_tokens: int | None = None,
    dtype: str = "auto",
    instruct: bool = False,
    trust_remote_code: bool = False,
    show_progress_bar: bool = False,
) -> LoadedModel:
    """Loads a checkpoint of ours or a released one with our code, anything else by sentence-transformers.

    Args:
        model: a local folder or a Hub name.
        max_length: tokens of a text with its instruction; a sentence-transformers model keeps its own limit if lower.
        batch_tokens: tokens of a batch, see `NVEmbedModel.encode`.
        instruct: give a sentence-transformers model the tasks' instructions, for models trained with them.

    Raises:
        ValueError: there is no such model, or it cannot be loaded.
    """
    config, commit = find_config(model, revision)
    name = "/".join(Path(model).resolve().parts[-2:]) if Path(model).is_dir() else model
    commit = commit or digest_model(Path(model))
    device = PartialState().device
    if config.get("model_type") == "nvembed":
        ours = NVEmbedModel.from_pretrained(model, revision=revision, dtype=dtype).to(device)
        positions = ours.config.text_config.max_position_embeddings
        if positions < max_length:
            logger.warning(
                "%s: texts are cut at the decoder's %d positions (max_position_embeddings), not at max_length %d",
                name, positions, max_length,
            )  # fmt: skip
        max_length = min(max_length, positions)
        embed = embed_with(ours, max_length, batch_tokens, show_progress_bar=show_progress_bar)
        room = max_length - ours.config.add_eos  # the end token comes behind the text
        count = partial(count_cut, ours.tokenizer, room)
        return LoadedModel(name, commit, embed, max_length, count_cut=count)

    from sentence_transformers import SentenceTransformer

    options = {"revision": revision, "trust_remote_code": trust_remote_code, "model_kwargs": {"dtype": dtype}}
    theirs = SentenceTransformer(model, device=str(device), **options)
    theirs.max_seq_length = min(theirs.max_seq_length or max_length, max_length)

    if theirs.similarity_fn_name not in ("cosine", "dot"):
        raise ValueError(f"{model} compares by {theirs.similarity_fn_name!r}; cosine and dot can be measured here")

    def encode(texts: list[str], prefix: str) -> np.ndarray:
        return theirs.encode(texts, prompt=prefix, convert_to_numpy=True, show_progress_bar=show_progress_bar)

    prompts = None if instruct else theirs.prompts | {"default": theirs.prompts.get(theirs.default_prompt_name, "")}
    similarity = ScoringFunction(theirs.similarity_fn_name)
    count = partial(count_cut, theirs.tokenizer, theirs.max_seq_length)
    return LoadedModel(name, commit, clean_texts(check_finite(encode)), max_length, similarity, prompts, count)


def count_cut(tokenizer: PreTrainedTokenizerBase, max_length: int, texts: list[str], prefix: str) -> int:
    """How many texts have more than `max_length` tokens with what stands before them."""
    # A token is a byte at least, so short texts need no look.
    whole = [clean(prefix + text) for text in texts]
    long = [text for text in whole if len(text.encode()) + 2 > max_length]
    if not long:
        return 0
    return sum(len(ids) > max_length for ids in tokenizer(long, truncation=False, verbose=False).input_ids)


def embed_with(model: NVEmbedModel, max_length: int, batch_tokens: int | None = None, **options) -> Embed:
    """Wraps `encode` of an NV-Embed model as an `Embed`."""

    def encode(texts: list[str], prefix: str) -> np.ndarray:
        return model.encode(texts, prefix, max_length, batch_tokens, convert_to_numpy=True, **options)

    return clean_texts(check_finite(encode))


def normalized(embed: Embed) -> Embed:
    """Wraps an `Embed` to give vectors of length 1, whose dot products are cosines."""

    def unit(texts: list[str], prefix: str) -> np.ndarray:
        return scaled_to_1(embed(texts, prefix))

    return unit


def scaled_to_1(vectors: np.ndarray) -> np.ndarray:
    """Rows `[vectors, width]` divided by their lengths."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)


def check_finite(embed: Embed) -> Embed:
    """Wraps an `Embed` to raise a `ValueError` on NaN or infinity in embeddings, as after a diverged training."""

    def checked(texts: list[str], prefix: str) -> np.ndarray:
        embeddings = embed(texts, prefix)
        if not np.isfinite(embeddings).all():
            raise ValueError("the model's embeddings hold NaN or infinity; if it was trained, lower the learning_rate")
        return embeddings

    return checked


def clean_texts(embed: Embed) -> Embed:
    """Wraps an `Embed` to replace NULs and halves of surrogate pairs, which public data sets contain."""

    def cleaned(texts: list[str], prefix: str) -> np.ndarray:
        return embed([clean(text) for text in texts], prefix)

    return cleaned


def clean(text: str) -> str:
    return text.replace("\0", " ").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_revision(model: str | None, revision: str | None) -> None:
    """Raises a `ValueError` if a revision is asked for of a local folder, which is read as it is."""
    if revision not in (None, "main") and model is not None and Path(model).is_dir():
        raise ValueError(
            f"revision {revision!r} is asked for of {model}, which is a folder and has none: leave it out, or name a "
            "model on the Hub"
        )


def find_config(model: str, revision: str | None) -> tuple[dict, str | None]:
    """The model's config, empty if a sentence-transformers model has none, and the Hub's commit.

    Raises:
        ValueError: there is neither such a folder nor such a Hub model; as `check_revision`.
    """
    check_revision(model, revision)
    folder = Path(model)
    if not folder.is_dir() and (model.count("/") != 1 or folder.parent.is_dir()):  # else it may be a Hub's owner/name
        raise ValueError(f"model {model!r}: there is no such folder, seen from the working directory {Path.cwd()}")
    quiet = {"_raise_exceptions_for_missing_entries": False}
    base = find_base_of_adapter(model, revision=revision)  # whose errors are not that there is no such model
    try:
        if base is not None:
            config, _ = find_config(base, None)
            file = cached_file(model, "adapter_config.json", revision=revision, **quiet)
            return config, extract_commit_hash(file, None)
        for file in ("config.json", "modules.json"):
            found = cached_file(model, file, revision=revision, **quiet)
            if found is not None:
                config = json.loads(Path(found).read_text()) if file == "config.json" else {}
                return config, extract_commit_hash(found, None)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {model!r} is neither a local folder nor a model found at {constants.ENDPOINT}: {error}"
        ) from error
    if folder.is_dir():
        raise ValueError(f"model {model!r} holds neither config.json nor modules.json; name a checkpoint's folder")
    raise ValueError(f"model {model!r} is neither a local folder nor a model found at {constants.ENDPOINT}")


def digest_model(folder: Path) -> str:
    """A digest of a local model's weights, config, tokenizer, modules and code; for an adapter, including its local
    base."""
    folders = [folder]
    if (folder / "modules.json").is_file():
        modules = json.loads((folder / "modules.json").read_text())
        folders += [folder / module["path"] for module in modules if module["path"]]
    files = (path for place in folders for path in place.glob("*"))  # a Normalize module has no folder
    suffixes = (".safetensors", ".bin", ".json", ".txt", ".model", ".py")
    digest = digest_files(folder, (path for path in files if path.suffix in suffixes))
    base = find_base_of_adapter(str(folder))
    if base is None or not Path(base).is_dir():
        return digest
    return hashlib.sha256(f"{digest} {digest_model(Path(base))}".encode()).hexdigest()[:16]
