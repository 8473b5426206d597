"""The words of a text in any script, and what makes two texts the same but for case and punctuation."""

import unicodedata

import regex


# Scripts that are written without spaces between words.
UNSPACED = "".join(
    rf"\p{{Script={name}}}" for name in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")
)
# A run of such a script with its marks, or a word of letters, digits and marks of others.
RUNS = regex.compile(rf"(?V1)(?P<unspaced>[[{UNSPACED}ー]&&[\w\p{{M}}]]+)|[[\w\p{{M}}]--[{UNSPACED}]]+")
CHARACTERS = regex.compile(r"\X")  # a letter with its marks


def split_words(text: str) -> list[str]:
    """The words of a text, one-letter words included; in scripts without spaces, characters and pairs of them.

    Overlapping pairs are how search engines index Chinese, Japanese and Thai without a dictionary; the single
    characters match words of one character. Full-width and half-width forms are the same (NFKC).
    """
    words = []
    for run in RUNS.finditer(unicodedata.normalize("NFKC", text)):
        if run["unspaced"] is None:
            words.append(run[0])
            continue
        characters = CHARACTERS.findall(run[0])
        words += characters
        words += map("".join, zip(characters, characters[1:]))
    return words


def normal_words(text: str) -> list[str]:
    """The words of a text in lower case, each once for each time it is there; in scripts without spaces, characters."""
    words = []
    for run in RUNS.finditer(unicodedata.normalize("NFKC", text).casefold()):
        words += [run[0]] if run["unspaced"] is None else CHARACTERS.findall(run[0])
    return words


def normalize(text: str) -> str:
    """The text's words in lower case, one space between them; a text without words stays as it is.

    Texts that are the same so are taken for near-identical: they differ in case, punctuation and spaces alone.
    """
    return " ".join(normal_words(text)) or text.strip()
