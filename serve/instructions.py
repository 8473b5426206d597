"""Finds a text's instruction in its tokens, for engines that are given instruction and text as one."""

from functools import lru_cache

from transformers import PreTrainedTokenizerFast

from nvembed.configuration_nvembed import NVEmbedConfig


SAMPLE = "Instruct: Given a question, find\nQuery: what is it, then?"


class InstructionFinder:
    """Tells from a text's tokens how many of them belong to its instruction, which is all that a server sees.

    An instruction is the longer of two: the longest of the checkpoint's `prompts` that the text begins with; and, if
    the text begins with "Instruct:", everything through the first line break followed by "Query:", with the space
    behind it.

    Raises:
        ValueError: the tokenizer does not give back a prompt, or a text with an instruction, from its tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: NVEmbedConfig):
        self.tokenizer = tokenizer
        self.is_masked = config.is_mask_instruction
        self.prompts = sorted({prompt for prompt in config.prompts.values() if prompt}, key=len, reverse=True)
        for text in (SAMPLE, *(f"{prompt}a" for prompt in self.prompts)) if self.is_masked else ():
            if (found := self._decode(tokenizer(text)["input_ids"])) != text:
                raise ValueError(
                    f"the tokenizer makes {found!r} of the tokens of {text!r}, so this instruction cannot be told from "
                    "them: a special token in a prompt, or no decoder in tokenizer.json?"
                )
        self._count = lru_cache(maxsize=1024)(lambda prefix: len(tokenizer.tokenize(prefix)))

    def length(self, token_ids: list[int]) -> int:
        """As `tokenize` counts it; at least one token is left."""
        if not self.is_masked or not self._may_begin(self._decode(token_ids[:8]).rstrip("\ufffd")):
            return 0
        prefix = self.find(self._decode(token_ids))
        return min(self._count(prefix), len(token_ids) - 1) if prefix else 0

    def find(self, text: str) -> str:
        """The instruction that a text begins with; "" if none."""
        known = next((prompt for prompt in self.prompts if text.startswith(prompt)), "")
        general = ""
        if text.startswith("Instruct:") and "\nQuery:" in text:
            end = text.index("\nQuery:") + len("\nQuery:")
            general = text[: end + text[end:].startswith(" ")]
        return max(known, general, key=len)

    def _may_begin(self, beginning: str) -> bool:
        """Whether a text with this beginning may have an instruction; spares most documents the rest."""
        return any(beginning.startswith(start) or start.startswith(beginning) for start in ("Instruct:", *self.prompts))

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
