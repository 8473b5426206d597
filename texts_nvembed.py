"""Texts to tensors: tokenizing, padding and packing, and how a batch is laid out in memory."""

import inspect
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from .configuration_nvembed import NVEmbedConfig


try:  # attention over concatenated texts of different lengths, CUDA only
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and newer
except ImportError:
    try:
        from flash_attn import flash_attn_varlen_func as varlen_attn
    except ImportError:
        varlen_attn = None
VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn else frozenset()

logger = logging.get_logger(__name__)

# Up to here, torch's attention and its gradient on a CPU are faster in fp32 than in bf16 (eval/speed/RESULTS.md).
FP32_TOKENS = 256


# --- Tokenizing: shared by `encode` and by the training collator -----------------------------------------------------


def format_instruction(task: str) -> str:
    """Formats a task definition as the prefix of a query (paper section 3.1); an empty task gives no prefix."""
    return f"Instruct: {task}\nQuery: " if task else ""


@dataclass
class TokenizedText:
    """Token ids of instruction + text; the first `instruction_length` are left out of the pooling."""

    input_ids: list[int]
    instruction_length: int


def tokenize(
    tokenizer: PreTrainedTokenizerFast,
    config: NVEmbedConfig,
    texts: list[str],
    instructions: list[str],
    max_length: int,
) -> list[TokenizedText]:
    """Tokenizes `instructions[i] + texts[i]`, truncated to `max_length` tokens, or to the decoder's positions if fewer.

    The instruction's length is counted as in the released code: its tokens without `<s>`. The count includes the final
    space of "Query: ", which merges into the text's first word; the two cancel, and just the instruction is left out.

    Raises:
        ValueError: `max_length` is not a positive integer, or an instruction fills it and leaves no text to pool.
    """
    check_number("max_length", max_length)
    positions = config.text_config.max_position_embeddings
    asked, max_length = max_length, min(max_length, positions)
    end = tokenizer.eos_token if config.add_eos else ""
    full = [instruction + text + end for instruction, text in zip(instructions, texts, strict=True)]
    encoded = tokenizer(full, max_length=max_length, truncation=True)
    rows = encoded["input_ids"]
    if max_length < asked and any(
        len(row) == max_length and encoding.overflowing for row, encoding in zip(rows, encoded.encodings)
    ):
        logger.warning_once(
            f"A text is longer than the decoder's {positions} positions (max_position_embeddings) and is cut there, "
            f"not at max_length {asked}."
        )
    _warn_of_doubled_ends(tokenizer, texts, rows)
    lengths = {"": 0}
    if config.is_mask_instruction:
        lengths |= {prefix: len(tokenizer.tokenize(prefix)) for prefix in set(instructions) if prefix}
    for row, prefix, text, whole in zip(rows, instructions, texts, full):
        left = len(row) - lengths.get(prefix, 0)
        # In a truncated row a few tokens can be left with none of the text: the prefix's last space, `</s>`.
        is_cut = lengths.get(prefix) and text and len(row) == max_length and left <= 3
        if left < 1 or (is_cut and not _holds_text(tokenizer, whole, len(prefix), max_length)):
            raise ValueError(
                f"the instruction {prefix!r} is {lengths[prefix]} tokens long and max_length is {max_length}: "
                "no token of the text is left to pool; raise max_length or shorten the instruction"
            )
    return [TokenizedText(row, lengths.get(prefix, 0)) for row, prefix in zip(rows, instructions)]


def _warn_of_doubled_ends(tokenizer: PreTrainedTokenizerFast, texts: list[str], rows: list[list[int]]) -> None:
    end = tokenizer.eos_token
    if end and any(text.endswith(end) and row[-2:] == 2 * [row[-1]] for text, row in zip(texts, rows)):
        logger.warning_once(
            f"A text ends in {end}, which is appended to every text already, so it now appears twice: leave it out "
            "(the released sentence-transformers recipe adds it by hand), or the embedding changes."
        )


def _holds_text(tokenizer: PreTrainedTokenizerFast, whole: str, prefix_length: int, max_length: int) -> bool:
    spans = tokenizer(whole, max_length=max_length, truncation=True, return_offsets_mapping=True)["offset_mapping"]
    return any(end > prefix_length for _, end in spans)


def pad(tokenized: list[TokenizedText], pad_token_id: int) -> dict[str, Tensor]:
    """Pads on the right: `input_ids`, `attention_mask` and `pool_mask`, each `[texts, longest]`."""
    lengths = torch.tensor([len(text.input_ids) for text in tokenized])
    instruction_lengths = torch.tensor([text.instruction_length for text in tokenized])
    longest = int(lengths.max())
    input_ids = torch.tensor([text.input_ids + [pad_token_id] * (longest - len(text.input_ids)) for text in tokenized])
    positions = torch.arange(longest)
    attention_mask = positions < lengths[:, None]
    pool_mask = attention_mask & (positions >= instruction_lengths[:, None])
    return {"input_ids": input_ids, "attention_mask": attention_mask.long(), "pool_mask": pool_mask.long()}


def pack(tokenized: list[TokenizedText]) -> dict[str, Tensor | list[int]]:
    """Concatenates texts: `input_ids` and `pool_mask`, each `[tokens]`, and the `lengths` of the texts."""
    input_ids = torch.tensor([token for text in tokenized for token in text.input_ids])
    lengths = [len(text.input_ids) for text in tokenized]
    pool_mask = torch.ones_like(input_ids)
    start = 0
    for text, length in zip(tokenized, lengths):
        pool_mask[start : start + text.instruction_length] = 0
        start += length
    return {"input_ids": input_ids, "pool_mask": pool_mask, "lengths": lengths}


def length_sorted_batches(lengths: list[int], batch_tokens: int, batch_size: int | None = None) -> Iterator[list[int]]:
    """Yields batches of indices, longest texts first, each of at most `batch_tokens` tokens and `batch_size` texts.

    A text longer than `batch_tokens` gets a batch of its own.
    """
    batch, tokens = [], 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (tokens + lengths[index] > batch_tokens or len(batch) == batch_size):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch


def check_number(name: str, value: int, largest: int | None = None) -> None:
    """Raises a `ValueError` that names the argument unless it is an integer from 1 to `largest`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1 or (largest and value > largest):
        raise ValueError(
            f"{name} is {value!r}; it must be a whole number, {f'1 to {largest}' if largest else '1 or more'}"
        )


def check_texts(texts: Iterable[str]) -> list[str]:
    """The texts as a list, after checking that a tokenizer can read each of them.

    Raises:
        TypeError: `texts` is a single string, or contains something other than strings.
        ValueError: there are no texts, or one contains a NUL character or half of a surrogate pair.
        RuntimeError: the iterable raised; the error says at which text.
    """
    if isinstance(texts, str):
        raise TypeError(f"prompts is the string {texts[:40]!r}; encode takes a list: encode([text])")
    if not isinstance(texts, Iterable) or isinstance(texts, (bytes, dict)):
        raise TypeError(f"prompts is of type {type(texts).__name__}; encode takes a list of strings")
    checked: list[str] = []
    try:
        checked.extend(texts)
    except Exception as error:  # `extend` keeps what came before it
        raise RuntimeError(f"prompts[{len(checked)}] could not be read: the iterable raised {error!r}") from error
    if len(checked) == 0:
        raise ValueError("prompts is an empty list; encode needs at least one text")
    for position, text in enumerate(checked):
        if not isinstance(text, str):
            raise TypeError(f"prompts[{position}] is {text!r} of type {type(text).__name__}, not a string")
        check_characters(text, f"prompts[{position}]")
    return checked


def check_characters(text: str, name: str) -> None:
    """Raises a `ValueError` for characters that tokenizers reject or misread; the error calls the text `name`."""
    if "\0" in text:
        raise ValueError(
            f"{name} holds a NUL character at position {text.index(chr(0))}, as broken extractions do; "
            'take it out: text.replace("\\0", "")'
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds half of a surrogate pair, {text[error.start]!r}, at position {error.start}; "
            'mend it: text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'
        ) from None


# --- Tokenizer files ------------------------------------------------------------------------------------------------


def load_tokenizer(
    name_or_path: str, add_pad_token: bool, vocab_size: int | None = None, **hub_options
) -> PreTrainedTokenizerFast:
    """Loads the checkpoint's own `tokenizer.json` unchanged, padding on the right.

    Not through `AutoTokenizer`: the class that the released checkpoints name, `LlamaTokenizer`, rebuilds its
    normalizer in transformers 5 and tokenizes differently.

    Args:
        vocab_size: rows of the token embedding; a pad token beyond them is replaced by `</s>`.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name_or_path, padding_side="right", **hub_options)
    except Exception as error:  # tokenizers raises bare ones
        raise ValueError(f"the tokenizer.json of {name_or_path} is missing or damaged ({error})") from error
    if tokenizer.pad_token is None and add_pad_token:
        tokenizer.pad_token = tokenizer.eos_token
    if vocab_size is not None and (tokenizer.pad_token_id or 0) >= vocab_size:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast | None, folder: str) -> None:
    """Writes the tokenizer in a form that every transformers from 4.51 on reads; transformers 5 by itself does not."""
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    path = Path(folder, "tokenizer_config.json")
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a name unknown to 4
    if not settings.get("extra_special_tokens"):
        settings.pop("extra_special_tokens", None)  # an empty list, where 4 expects a dictionary
    for how_it_was_loaded in ("backend", "is_local", "local_files_only"):
        settings.pop(how_it_was_loaded, None)
    path.write_text(json.dumps(settings, indent=2) + "\n")


# --- Layouts of the texts of a batch in memory -----------------------------------------------------------------------


class PaddedLayout:
    """Texts as rows `[batch, tokens]`, the shorter ones padded on the right."""

    def __init__(self, tokens: int, attention_mask: Tensor | None = None):
        self.tokens = tokens
        self.mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]

    def positions(self, device: torch.device) -> Tensor:
        return torch.arange(self.tokens, device=device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, dropout: float = 0.0) -> Tensor:
        """Attention within each row, padding masked.

        Shapes are `[batch, tokens, heads, head_dim]`; k and v may have fewer heads.
        """
        mask = None if self.mask is None else self.mask.to(q.device)
        k, v = repeat_heads(k, q.shape[-2]), repeat_heads(v, q.shape[-2])
        if is_causal and mask is not None:
            mask, is_causal = mask & mask.new_ones(self.tokens, self.tokens).tril(), False
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v, mask, dropout, is_causal).transpose(1, 2)

    def sum(self, x: Tensor) -> Tensor:
        """Sums over the tokens of each text: `[batch, tokens, ...]` to `[batch, ...]`."""
        return x.sum(1)

    def last(self, x: Tensor) -> Tensor:
        """The last token of each text: `[batch, tokens, ...]` to `[batch, ...]`."""
        if self.mask is None:
            return x[:, -1]
        ends = self.mask[:, 0, 0].sum(-1).to(x.device)
        return x[torch.arange(len(x), device=x.device), ends - 1]


class PackedLayout:
    """Concatenated texts, `[tokens]`: no padding and no work spent on it.

    Args:
        lengths: number of tokens of each text. Without a kernel for variable lengths, neighbours of equal length share
            an attention call, so texts should be sorted by length.
    """

    def __init__(self, lengths: list[int]):
        self.lengths = lengths
        self._cumulative: Tensor | None = None

    def positions(self, device: torch.device) -> Tensor:
        return torch.cat([torch.arange(length) for length in self.lengths]).to(device, non_blocking=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, dropout: float = 0.0) -> Tensor:
        """Attention within each text; shapes are `[tokens, heads, head_dim]`, k and v may have fewer heads."""
        if has_varlen_kernel(q, is_causal) and not dropout:
            ends, longest = self._ends(q.device), max(self.lengths)
            # flash-attn always shares keys among the heads of a group, torch 2.13 and newer only on request.
            if not VARLEN_OPTIONS & {"causal", "enable_gqa"}:
                k, v = repeat_heads(k, q.shape[-2]), repeat_heads(v, q.shape[-2])
            options = varlen_options(is_causal, is_grouped=k.shape[-2] < q.shape[-2])
            # torch's 2:4 linear layers give column-major outputs; the kernel needs stride 1 in the last dimension.
            q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
            return varlen_attn(q, k, v, ends, ends, longest, longest, **options)
        k, v = repeat_heads(k, q.shape[-2]), repeat_heads(v, q.shape[-2])
        runs = [(sum(1 for _ in run), length) for length, run in groupby(self.lengths)]
        # One split, not a slice for each run, whose gradient would be as large as all tokens.
        parts = (x.split([texts * length for texts, length in runs]) for x in (q, k, v))
        out = []
        for run, *rows in zip(runs, *parts):
            rows = (x.unflatten(0, run).transpose(1, 2) for x in rows)
            attended = attention(*rows, None, dropout, is_causal)
            out.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(out)

    def _ends(self, device: torch.device) -> Tensor:
        """Cumulative lengths from 0, int32 `[texts + 1]`, computed once per batch for all layers."""
        if self._cumulative is None or self._cumulative.device != device:
            ends = torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32)
            self._cumulative = ends.to(device, non_blocking=True)
        return self._cumulative

    def sum(self, x: Tensor) -> Tensor:
        """Sums over the tokens of each text: `[tokens, ...]` to `[texts, ...]`."""
        return torch.stack([text.sum(0) for text in x.split(self.lengths)])

    def last(self, x: Tensor) -> Tensor:
        """The last token of each text: `[tokens, ...]` to `[texts, ...]`."""
        return x.index_select(0, self._ends(x.device).narrow(0, 1, len(self.lengths)) - 1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, is_causal: bool) -> Tensor:
    """torch's attention, `[..., heads, tokens, head_dim]`; short texts on a CPU in fp32 if there is a gradient."""
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if has_gradient and q.device.type == "cpu" and v.dtype == torch.bfloat16 and q.shape[-2] <= FP32_TOKENS:
        with torch.autocast("cpu", enabled=False):  # it would cast the inputs back
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, dropout, is_causal)
        return out.to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)


def has_varlen_kernel(q: Tensor, is_causal: bool) -> bool:
    half, fits = q.dtype in (torch.float16, torch.bfloat16), q.shape[-1] <= 256
    known = bool(varlen_attn) and (not is_causal or bool(VARLEN_OPTIONS & {"causal", "is_causal", "window_size"}))
    return known and q.is_cuda and half and fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


def varlen_options(is_causal: bool, is_grouped: bool) -> dict[str, bool | tuple[int, int]]:
    """The arguments for a causal mask and grouped heads in this version of the kernel."""
    options: dict[str, bool | tuple[int, int]] = {}
    if is_grouped and "enable_gqa" in VARLEN_OPTIONS:
        options["enable_gqa"] = True
    if is_causal:
        name = next(name for name in ("causal", "is_causal", "window_size") if name in VARLEN_OPTIONS)
        options[name] = (-1, 0) if name == "window_size" else True  # no limit to the left, nothing to the right
    return options


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values `[..., kv_heads, head_dim]`, each repeated for the query heads that share it."""
    # Not `enable_gqa` of scaled_dot_product_attention: with a mask it has no fused kernel on CUDA.
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], dim=-2)
