"""An instruction found in tokens is as long as the one that `encode` was given. `make test-vllm` asks vLLM itself."""

import pytest
from tokenizers import decoders

from nvembed import NVEmbedConfig
from nvembed.serve.instructions import InstructionFinder
from nvembed.texts_nvembed import format_instruction, load_tokenizer, tokenize
from nvembed.train.released import append_eos


QUESTION = format_instruction("Given a question, retrieve passages that answer the question")
OWN = "Represent this sentence:"
TEXTS = ["what is it?", "Query: of a text", "A text.\nQuery: within", " a space", "", "é 漢字 🙂", "x" * 300]


@pytest.fixture(params=["bpe", "sentencepiece"])
def tokenizer(request):
    if request.param == "bpe":
        model = request.getfixturevalue("model")
        return model.tokenizer
    return append_eos(load_tokenizer(str(request.getfixturevalue("golden_dir") / "checkpoint"), True))


def config(prompts=(), **options):
    known = {"own": OWN, "short": "Represent", "none": "", "e5": "query: ", "cjk": "检索与问题相关的段落："}
    return NVEmbedConfig(add_eos=False, prompts=known | dict(prompts), **options)


@pytest.mark.parametrize("instruction", [QUESTION, QUESTION.rstrip(" "), OWN, "query: ", "检索与问题相关的段落：", ""])
def test_lengths_are_those_of_tokenize(tokenizer, instruction):
    finder = InstructionFinder(tokenizer, config())
    texts = TEXTS if not instruction.endswith(":") else [text for text in TEXTS if not text.startswith(" ")]
    for length in (16, 64, 512):
        for text in texts:
            try:
                (row,) = tokenize(tokenizer, config(), [text], [instruction], length)
            except ValueError:  # nothing is left to pool
                continue
            found = finder.length(row.input_ids)
            assert found == row.instruction_length, (text, instruction)


def test_documents_are_not_masked(tokenizer):
    finder = InstructionFinder(tokenizer, config())
    documents = [
        "It says:\nQuery: of a document",
        "Query: x",
        "instruct: a\nQuery: b",
        "Instruct: without the other",
        "",
    ]
    for document in documents:
        assert finder.length(tokenizer(document)["input_ids"]) == 0, document


def test_a_model_that_pools_its_instructions(tokenizer):
    finder = InstructionFinder(tokenizer, config(is_mask_instruction=False))
    assert finder.length(tokenizer(QUESTION + "a")["input_ids"]) == 0


def test_an_instruction_with_several_queries_is_found_among_the_prompts(tokenizer):
    """By its form alone it would end at the first "Query:"."""
    few_shot = "Instruct: Find\nQuery: who?\nDocument: me.\nQuery: "
    text = tokenizer(few_shot + "and now?")["input_ids"]
    assert InstructionFinder(tokenizer, config({"few": few_shot})).length(text) == len(tokenizer.tokenize(few_shot))
    assert InstructionFinder(tokenizer, config()).find(few_shot) == "Instruct: Find\nQuery: "


def test_a_prompt_with_a_special_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match="a special token in a prompt"):
        InstructionFinder(tokenizer, config({"odd": f"Represent {tokenizer.eos_token} this: "}))


def test_a_tokenizer_that_cannot_be_decoded_is_refused(model):
    model.tokenizer.backend_tokenizer.decoder = decoders.Replace(" ", "_")
    with pytest.raises(ValueError, match="this instruction cannot be told from them"):
        InstructionFinder(model.tokenizer, config())
