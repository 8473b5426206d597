"""The distinct texts that negatives are mined from, in memory or on disk."""

from collections.abc import Iterator, Sequence

import numpy as np

from nvembed.eval.files import text_id


class Corpus(Sequence[str]):
    """Distinct texts by position, and the position of a text by its hash: 16 bytes a text beside the texts themselves.

    Args:
        texts: distinct; a list, or `nvembed.eval.data.corpus.Texts` on disk.
    """

    def __init__(self, texts: Sequence[str]):
        self._texts = texts
        hashes = np.fromiter(map(text_id, texts), dtype=np.int64, count=len(texts))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, position: int) -> str:
        return self._texts[position]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def positions(self, texts: Sequence[str]) -> np.ndarray:
        """The position of each text, int64.

        Raises:
            ValueError: a text is not in the corpus.
        """
        hashes = np.fromiter(map(text_id, texts), dtype=np.int64, count=len(texts))
        places = np.searchsorted(self._hashes, hashes).clip(max=len(self) - 1)
        if (missing := np.flatnonzero(self._hashes[places] != hashes)).size:
            raise ValueError(f"{texts[missing[0]][:80]!r} is not in the corpus of {len(self)} texts")
        return self._order[places]
