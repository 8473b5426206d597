"""Teachers rank a corpus for mining: BM25, an embedding model, either of them reranked by a cross-encoder."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from nvembed.eval.processes import Embed
from nvembed.eval.search import exact_search
from nvembed.eval.vectors import VectorShards
from nvembed.train.data.bm25s_alone import bm25s
from nvembed.train.data.corpus import Corpus
from nvembed.train.data.words import split_words


COMPILED = 100_000  # from so many documents on, compiling the search (8 s) pays: at 1,000,000 it is 150 times as fast


class Teacher(Protocol):
    """Ranks the documents of the corpus it was built on.

    Attributes:
        block: how many queries are best searched at a time.
    """

    block: int

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `k` best documents for each query.

        Returns:
            Scores (fp32) and positions in the corpus (int64), both `[queries, min(k, documents)]`, best first. The
            position is -1 where the teacher cannot rank the remaining documents.
        """

    def pair_scores(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """The score of each query with the document beside it, which is in the corpus: fp32 `[queries]`."""


class BM25:
    """BM25 (Lucene's, k1 = 1.5, b = 0.75) over the words of `split_words`, lower-case, without English stop words."""

    block = 256

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        self.tokenizer = bm25s.tokenization.Tokenizer(lower=True, splitter=split_words, stopwords="en")
        ids = self.tokenizer.tokenize(corpus, update_vocab=True, show_progress=False, allow_empty=False)
        self.documents = len(corpus)
        self.index: bm25s.BM25 | None = None
        if any(ids):  # bm25s cannot index a corpus without a word
            backend = "numba" if self.documents >= COMPILED else "numpy"
            self.index = bm25s.BM25(backend=backend, auto_compile=False)  # indexing itself gains nothing
            self.index.index(
                bm25s.tokenization.Tokenized(ids, self.tokenizer.word_to_id),
                create_empty_token=False,
                show_progress=False,
            )

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Teacher.search`; documents that share no word with the query are not ranked."""
        k = min(k, self.documents)
        scores = np.zeros((len(queries), k), dtype=np.float32)
        positions = np.full((len(queries), k), -1, dtype=np.int64)
        words = self._words(queries)
        known = [row for row, ids in enumerate(words) if ids]
        if known:
            found = self.index.retrieve([words[row] for row in known], k=k, n_threads=-1, show_progress=False)
            scores[known] = found.scores
            positions[known] = np.where(found.scores > 0, found.documents, -1)
        return scores, positions

    def pair_scores(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        scores = np.zeros(len(queries), dtype=np.float32)
        distinct = list(dict.fromkeys(queries))  # one query is often scored with many documents
        words = dict(zip(distinct, self._words(distinct)))
        positions = self.corpus.positions(documents)
        for row, (query, position) in enumerate(zip(queries, positions, strict=True)):
            for word in words[query]:
                scores[row] += self._word_score(word, position)
        return scores

    def _words(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text's words, without those that the corpus lacks."""
        return self.tokenizer.tokenize(texts, update_vocab="never", show_progress=False, allow_empty=False)

    def _word_score(self, word: int, position: int) -> np.float32:
        """A word's share of a document's score: one entry of the sparse index, whose columns are words."""
        start, end = self.index.scores["indptr"][word : word + 2]
        place = start + np.searchsorted(self.index.scores["indices"][start:end], position)
        holds = place < end and self.index.scores["indices"][place] == position
        return self.index.scores["data"][place] if holds else np.float32(0)


class EmbeddingModel:
    """Ranks by the dot products of an embedding model, exactly; the corpus's vectors stay on disk.

    In memory are, beside the model and the corpus: 4 * width bytes for each of `block` queries and of 50,000 documents,
    60 * k bytes a query for the results and their order, and 64 MB of FAISS; that does not grow with the corpus.
    Vectors in fp16 or int8 take their own size more.

    Args:
        corpus: the texts that `vectors` are of, in the same order.
        embed: (queries, prefix) -> fp32 `[queries, width]`.
        prefix: the instruction, as the model reads it before a query.

    Raises:
        ValueError: there is another number of vectors than of texts.
    """

    block = 16_384

    def __init__(self, corpus: Corpus, vectors: VectorShards, embed: Embed, prefix: str):
        if len(vectors) != len(corpus):
            raise ValueError(f"{vectors.folder} has {len(vectors)} vectors for a corpus of {len(corpus)} texts")
        self.corpus, self.vectors, self.embed, self.prefix = corpus, vectors, embed, prefix
        self._embedded: dict[str, np.ndarray] = {}  # of the last queries: they are scored, then searched

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        return exact_search(self._embed(queries), self.vectors.blocks(), k)

    def pair_scores(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        vectors = self.vectors[self.corpus.positions(documents)]
        return np.einsum("qd,qd->q", self._embed(queries), vectors)

    def _embed(self, queries: Sequence[str]) -> np.ndarray:
        distinct = list(dict.fromkeys(queries))
        if not self._embedded.keys() >= set(distinct):
            embeddings = self.embed(distinct, self.prefix)
            if embeddings.shape[1] != self.vectors.width:
                raise ValueError(
                    f"{self.vectors.folder} has vectors of width {self.vectors.width}, the teacher's queries have "
                    f"{embeddings.shape[1]}: they are of another model"
                )
            self._embedded = dict(zip(distinct, embeddings))
        return np.stack([self._embedded[query] for query in queries])


class Reranked:
    """Ranks a first teacher's best documents anew, by a cross-encoder's scores.

    Args:
        first: finds the documents.
        score: (query, document) pairs -> one score each, as `sentence_transformers.CrossEncoder.predict`.
    """

    def __init__(self, corpus: Corpus, first: Teacher, score: Callable[[list[tuple[str, str]]], np.ndarray]):
        self.corpus, self.first, self.score = corpus, first, score
        self.block = first.block

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        _, positions = self.first.search(queries, k)
        rows, columns = np.nonzero(positions >= 0)
        texts = [self.corpus[int(position)] for position in positions[rows, columns]]
        scores = np.full(positions.shape, -np.inf, dtype=np.float32)
        scores[rows, columns] = self.score([(queries[row], text) for row, text in zip(rows, texts)]) if texts else []
        order = np.argsort(-scores, axis=1, kind="stable")
        return np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)

    def pair_scores(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        return np.asarray(self.score(list(zip(queries, documents))), dtype=np.float32)
