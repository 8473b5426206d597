"""Finds a text's instruction in its tokens, for engines that are given instruction and text as one."""

from transformers import PreTrainedTokenizerFast

from nvembed.configuration_nvembed import NVEmbedConfig


class InstructionFinder:
    """Tells from a text's tokens how many of them belong to its instruction, which is all that a server sees.

    An instruction is one of the checkpoint's `prompts`, the longest that the text begins with, or "Instruct:" and all
    up to and with the first "\\nQuery:", with the space behind it if there is one.

    Raises:
        ValueError: the tokenizer does not give back a text from its tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: NVEmbedConfig):
        self.tokenizer = tokenizer
        self.is_masked = config.is_mask_instruction
        self.prompts = sorted({prompt for prompt in config.prompts.values() if prompt}, key=len, reverse=True)
        self.lengths: dict[str, int] = {}
        sample = "Instruct: Given a question, find\nQuery: what is it, then?"
        if self.is_masked and (found := self.decode(tokenizer(sample)["input_ids"])) != sample:
            raise ValueError(
                f"the tokenizer makes {found!r} of the tokens of {sample!r}, so no instruction can be told from them; "
                "has its tokenizer.json a decoder?"
            )

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def length(self, token_ids: list[int]) -> int:
        """As `tokenize` counts it; at least one token is left."""
        if not self.is_masked:
            return 0
        beginning = self.decode(token_ids[:8])
        if not any(prompt.startswith(beginning[:8]) for prompt in ("Instruct:", *self.prompts)):
            return 0  # most documents
        text = self.decode(token_ids)
        prefix = self.find(text)
        if prefix not in self.lengths:
            self.lengths[prefix] = len(self.tokenizer.tokenize(prefix)) if prefix else 0
        return min(self.lengths[prefix], len(token_ids) - 1)

    def find(self, text: str) -> str:
        known = next((prompt for prompt in self.prompts if text.startswith(prompt)), "")
        general = ""
        if text.startswith("Instruct:") and "\nQuery:" in text:
            end = text.index("\nQuery:") + len("\nQuery:")
            general = text[: end + text[end:].startswith(" ")]
        return max(known, general, key=len)
