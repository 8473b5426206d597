"""Clustering: k-means on embeddings, scored by V-measure."""

from sklearn.cluster import KMeans
from sklearn.metrics import v_measure_score

from nvembed.eval.retrieval import Encode
from nvembed.modeling_nvembed import format_instruction


def v_measure(
    encode: Encode, texts: list[str], labels: list[str], instruction: str = "", runs: int = 5, **options
) -> float:
    """Mean V-measure over k-means runs with seeds 0..runs-1, k the number of labels.

    Args:
        instruction: the task definition, on every text: clustering is a symmetric task.
        options: further arguments of `encode`, such as `max_length`.
    """
    embeddings = encode(texts, instruction=format_instruction(instruction), **options).float().cpu().numpy()
    clusters = (KMeans(len(set(labels)), n_init=3, random_state=seed).fit_predict(embeddings) for seed in range(runs))
    return sum(v_measure_score(labels, assignment) for assignment in clusters) / runs
