"""How embeddings fill their space: mean cosine of unrelated texts, effective rank."""

import torch
from torch import Tensor


def mean_cosine(embeddings: Tensor) -> float:
    """The mean cosine of two different rows of `[texts, hidden]`, L2-normalized: 0 if they point anywhere.

    Raises:
        ValueError: there are fewer than two rows.
    """
    texts = len(embeddings)
    if texts < 2:
        raise ValueError(f"{texts} embeddings have no pairs; give two or more")
    total = embeddings.double().sum(0).square().sum()  # of all pairs, each row with itself among them
    return ((total - texts) / (texts * (texts - 1))).item()


def effective_rank(embeddings: Tensor) -> float:
    """Over how many dimensions `[texts, hidden]` spread: the exponential of the entropy of their singular values.

    Roy and Vetterli, 2007; of embeddings in RankMe (arXiv 2210.02885). Not centred, so that a direction that all
    share counts against it. At most the smaller of the two sizes: compare equally many texts.
    """
    values = torch.linalg.svdvals(embeddings.float())
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()
