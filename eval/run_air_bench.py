"""Measures a model on AIR-Bench 24.05, English, QA and Long-Doc: the paper's check out of domain.

python eval/run_air_bench.py --model DIR_OR_REPO --output_dir OUT

Dev splits are scored here. The judgements of the test splits are private: their search results are zipped in the
leaderboard's layout, to be submitted at https://huggingface.co/spaces/AIR-Bench/leaderboard.
"""

import json
import logging
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from nvembed.eval.arguments import EvaluationArguments, run_script
from nvembed.eval.data.corpus import digest_documents
from nvembed.eval.files import whole
from nvembed.eval.measure import unreachable
from nvembed.eval.models import LoadedModel
from nvembed.eval.processes import Embed, split_over_processes
from nvembed.eval.results import claim_folder
from nvembed.eval.search import exact_search
from nvembed.eval.tasks.instructions import known_instructions
from nvembed.eval.vectors import MadeFrom, embed_shards


try:
    from air_benchmark import AIRBench, Retriever
except ImportError as error:
    advice = "pip install --no-deps air-benchmark==0.1.0 rich (one of its dependencies does not build everywhere)"
    raise ImportError(f"AIR-Bench's package is not whole: {error}; {advice}") from error


logger = logging.getLogger("run_air_bench")

VERSION = "AIR-Bench_24.05"


NQ = known_instructions()["NQ"].query  # the paper's for question answering


@dataclass
class AirBenchArguments(EvaluationArguments):
    task_types: list[str] = field(default_factory=lambda: ["qa", "long-doc"], metadata={"help": "qa, long-doc."})
    domains: list[str] | None = field(default=None, metadata={"help": "wiki, web, law, ...; all if left out."})
    splits: list[str] = field(default_factory=lambda: ["dev", "test"], metadata={"help": "dev, test."})
    instruction: str = field(default=NQ, metadata={"help": "Task definition of queries; documents have none."})
    top_k: int = field(default=1000, metadata={"help": "Documents per query in the search results."})

    def __post_init__(self):
        super().__post_init__()
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be a number of documents, 1 or more")


class DenseRetriever(Retriever):
    """The retriever that AIR-Bench calls for each data set; it keeps a corpus's embeddings in shards in `folder`."""

    def __init__(self, model: LoadedModel, embed: Embed, instruction: str, folder: Path, top_k: int = 1000):
        super().__init__(top_k)
        self.name, self.folder = model.name.replace("/", "__"), folder
        self.embed = embed
        self.model = model
        self.query_prefix, self.document_prefix = model.query_prefix(instruction), model.document_prefix()

    def __str__(self) -> str:
        return self.name

    def __call__(self, corpus: dict[str, dict], queries: dict[str, str], **kwargs) -> dict[str, dict[str, float]]:
        """Query id -> document id -> similarity, of the `search_top_k` best documents."""
        document_ids, texts = list(corpus), [document["text"] for document in corpus.values()]
        digest = digest_documents(zip(document_ids, texts))
        made_from = MadeFrom(self.name, self.model.revision, self.document_prefix, self.model.max_length, digest)
        folder = self.folder / digest
        documents = embed_shards(self.embed, document_ids, texts, folder, made_from)
        query_embeddings = self.embed(list(queries.values()), self.query_prefix)
        scores, positions = exact_search(query_embeddings, documents.blocks(), self.search_top_k)
        shutil.rmtree(folder)
        return {
            query_id: {document_ids[p]: s for p, s in zip(row_positions, row_scores)}
            for query_id, row_positions, row_scores in zip(queries, positions.tolist(), scores.tolist())
        }


def run(args: AirBenchArguments) -> Path | None:
    """Writes search results, `dev_scores.json` and `.md`, and the zip file; returns the folder on the main process.

    Raises:
        ValueError: as `load_model` and `claim_folder`, or a task type, domain or split that AIR-Bench does not have.
        ConnectionError: the Hub cannot be reached for a data set.
    """
    options = {"languages": ["en"], "splits": args.splits}
    benchmark = AIRBench(VERSION, task_types=args.task_types, domains=args.domains, **options)
    model = args.load()
    if args.instruction not in (NQ, ""):
        model.check_reads("instruction", args.instruction)
    with split_over_processes(model.embed_for_search) as embed:
        if embed is None:
            return None
        settings = args.settings(model) | {"instruction": args.instruction, "top_k": args.top_k}
        folder = claim_folder(args.output_dir, settings, {})
        search_results = folder / "search_results"
        remove_half_written(search_results)
        retriever = DenseRetriever(model, embed, args.instruction, folder / "embeddings", args.top_k)
        try:
            benchmark.run(retriever, output_dir=str(search_results))
            if "dev" in args.splits:
                score_dev(search_results, folder)
        except ConnectionError as error:
            raise unreachable("AIR-Bench", str(error)) from error
        if "test" in args.splits:
            zip_test(search_results / str(retriever) / "NoReranker", folder / f"{retriever}_NoReranker.zip")
        return folder


def score_dev(search_results: Path, folder: Path) -> None:
    """AIR-Bench's own measures of the dev splits, as JSON and as Markdown."""
    for method, suffix in (("json", "json"), ("markdown", "md")):
        path = folder / f"dev_scores.{suffix}"
        AIRBench.evaluate_dev(VERSION, str(search_results), output_method=method, output_path=str(path))
    print(path.read_text())


def zip_test(results: Path, target: Path) -> None:
    """Zips search results of the test splits in the leaderboard's layout: `<task type>/<domain>/en_..._test.json`."""
    with whole(target) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(results.rglob("*_test.json")):
            archive.write(file, file.relative_to(results))


def remove_half_written(search_results: Path) -> None:
    """Removes files cut off while being written, which AIR-Bench would take for finished."""
    for file in search_results.rglob("*.json"):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            logger.warning("%s was cut off when it was written; it is searched again", file)
            file.unlink()


def main() -> None:
    folder = run_script("run_air_bench", AirBenchArguments, run)
    if PartialState().is_main_process:
        print(f"search results and scores are in {folder}")


if __name__ == "__main__":
    main()
