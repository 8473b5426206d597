"""Models as mteb sees them: checkpoints of ours with a task's instruction, any sentence-transformers model as it is."""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import transformers
from accelerate import PartialState
from huggingface_hub import constants
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from transformers import HfArgumentParser
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from nvembed.eval.instructions import TaskInstruction
from nvembed.eval.processes import Embed
from nvembed.modeling_nvembed import NVEmbedModel, find_base_of_adapter, format_instruction


logger = logging.getLogger(__name__)

MAX_LENGTH = 512  # tokens of a text with its instruction (paper section 5.1)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to embed.

    Args:
        name: of results; the last two parts of a folder's path, or the Hub name.
        revision: the Hub's commit, or a digest of a folder's files.
        embed: (texts, prefix) -> fp32 `[texts, width]`; the prefix is an instruction as the model reads it.
        max_length: tokens of a text with its instruction at most.
        similarity: that it was trained for, cosine or dot product.
        prompts: the model's own prompts by name, instead of the tasks' instructions; None: it takes these.
    """

    name: str
    revision: str
    embed: Embed
    max_length: int = MAX_LENGTH
    similarity: ScoringFunction = ScoringFunction.COSINE
    prompts: dict[str, str] | None = None


@dataclass
class ModelArguments:
    """Options of every script that measures a model."""

    model: str = field(metadata={"help": "Checkpoint folder or Hub name; any sentence-transformers model, too."})
    output_dir: str = field(metadata={"help": "Folder for the results of this model; run again to resume."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    max_length: int = field(default=MAX_LENGTH, metadata={"help": "Tokens of a text with its instruction."})
    batch_tokens: int | None = field(default=None, metadata={"help": "Tokens of a batch; found by device if left out."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the weights; auto: as in the checkpoint."}
    )
    instruct: bool = field(
        default=False, metadata={"help": "Give a sentence-transformers model the tasks' instructions, too."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "For sentence-transformers models with code of their own."}
    )

    def __post_init__(self):
        for name in ("max_length", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be a number of tokens, 1 or more")

    def load(self) -> "LoadedModel":
        """As `load_model`; the main process shows a progress bar."""
        options = {"instruct": self.instruct, "trust_remote_code": self.trust_remote_code}
        options |= {"show_progress_bar": PartialState().is_main_process}
        return load_model(self.model, self.revision, self.max_length, self.batch_tokens, self.dtype, **options)

    def settings(self, model: "LoadedModel") -> dict:
        """What else than the data decides the scores."""
        settings = {"model": model.name, "revision": model.revision, "max_length": model.max_length}
        return settings | {"dtype": self.dtype, "instruct": self.instruct}


def run_script(name: str, arguments: type[ModelArguments], run: Callable[[Any], Any]) -> Any:
    """`run` with the arguments of the command line; what is wrong with them, or with the data, is one line."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for kernels that nothing here uses
    (args,) = HfArgumentParser(arguments).parse_args_into_dataclasses()
    try:
        return run(args)
    except (ValueError, ConnectionError) as error:
        sys.exit(f"{name}: {error}")


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
        instruct: give a sentence-transformers model the tasks' instructions, as those that were trained so expect.

    Raises:
        ValueError: no model is there, or it cannot be loaded.
    """
    config, commit = find_config(model, revision)
    name = "/".join(Path(model).resolve().parts[-2:]) if Path(model).is_dir() else model
    commit = commit or fingerprint(Path(model))
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
        return LoadedModel(name, commit, embed, max_length)

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
    return LoadedModel(name, commit, careful(encode), max_length, similarity, prompts)


def embed_with(model: NVEmbedModel, max_length: int, batch_tokens: int | None = None, **options) -> Embed:
    """`encode` of a model of ours as an `Embed`."""

    def encode(texts: list[str], prefix: str) -> np.ndarray:
        return model.encode(texts, prefix, max_length, batch_tokens, convert_to_numpy=True, **options)

    return careful(encode)


def careful(embed: Embed) -> Embed:
    """An `Embed` that takes the texts of public data sets as they are, and gives finite numbers.

    Raises:
        ValueError: an embedding is not finite, as those of a model whose training diverged.
    """

    def checked(texts: list[str], prefix: str) -> np.ndarray:
        embeddings = embed([readable(text) for text in texts], prefix)
        if not np.isfinite(embeddings).all():
            raise ValueError("the model's embeddings hold NaN or infinity; if it was trained, lower the learning_rate")
        return embeddings

    return checked


def find_config(model: str, revision: str | None) -> tuple[dict, str | None]:
    """The model's config, empty where a sentence-transformers model has none, and the Hub's commit.

    Raises:
        ValueError: neither a folder nor a Hub model is there.
    """
    folder = Path(model)
    if not folder.is_dir() and (model.count("/") != 1 or folder.parent.is_dir()):  # else it may be a Hub's owner/name
        raise ValueError(f"--model {model!r}: there is no such folder")
    quiet = {"_raise_exceptions_for_missing_entries": False}
    try:
        if (base := find_base_of_adapter(model, revision=revision)) is not None:
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
            f"--model {model!r} is neither a local folder nor a model that {constants.ENDPOINT} gives: {error}"
        ) from error
    if folder.is_dir():
        raise ValueError(f"--model {model!r} holds neither config.json nor modules.json; name a checkpoint's folder")
    raise ValueError(f"--model {model!r} is neither a local folder nor a model that {constants.ENDPOINT} gives")


def fingerprint(folder: Path) -> str:
    """A digest of the files that make a local model what it is: weights, config, tokenizer, modules, code; of an
    adapter, those of a local base, too."""
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
    return hashlib.sha256(f"{digest} {fingerprint(Path(base))}".encode()).hexdigest()[:16]


def digest_files(folder: Path, paths: Iterable[Path]) -> str:
    """16 hexadecimal digits of the files' places below the folder, and of what they hold."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            digest.update(str(path.relative_to(folder)).encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


class TaskEncoder(AbsEncoder):
    """What mteb calls: collects a task's texts, looks up their instruction and embeds them.

    Args:
        instructions: by name of the task.
    """

    def __init__(self, model: LoadedModel, embed: Embed, instructions: Mapping[str, TaskInstruction]):
        self.prompts, self.embed, self.instructions = model.prompts, embed, instructions
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
        """Embeddings `[texts, width]` of what a `DataLoader` of mteb's yields; equal texts are embedded once."""
        texts = [text for batch in inputs for text in batch["text"]]
        unique = {text: position for position, text in enumerate(dict.fromkeys(texts))}
        embeddings = self.embed(list(unique), self.prefix(task_metadata, prompt_type))
        return embeddings[[unique[text] for text in texts]]

    def prefix(self, task_metadata: TaskMetadata, prompt_type: PromptType | None) -> str:
        """The instruction of one side of a task as the model reads it."""
        if self.prompts is not None:
            return self.prompts.get(get_prompt_name(self.prompts, task_metadata, prompt_type) or "default", "")
        instruction = self.instructions[task_metadata.name]
        return format_instruction(instruction.document if prompt_type is PromptType.document else instruction.query)


def readable(text: str) -> str:
    """A text of a public data set as `encode` takes it: without NUL, without halves of surrogate pairs."""
    return text.replace("\0", " ").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
