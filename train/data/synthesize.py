"""Synthetic triplets by a language model, in the paper's two steps: brainstorm tasks, then one example a task.

python train/data/synthesize.py --endpoint http://localhost:8000/v1 --model NAME --tasks 60000 --output_dir OUT
python train/data/synthesize.py --local_model FOLDER_OR_HUB_NAME --tasks 100 --output_dir OUT

Any OpenAI-compatible endpoint will do: vLLM, Ollama, or a hosted one, whose key is read from OPENAI_API_KEY. Every
answer is kept in answers.jsonl, so running it again goes on without asking, or paying, twice.
"""

import argparse
import asyncio
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from tqdm import tqdm

from nvembed.eval.files import whole, write_json
from nvembed.texts_nvembed import check_characters
from nvembed.train.data.words import normalize
from nvembed.train.data.writers import Answer, Answers, Endpoint, LocalModel, Writer


PROMPTS = Path(__file__).with_name("prompts.yaml")
TASKS_PER_CALL = 20
FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)
FIELDS = ("user_query", "positive_document", "hard_negative_document")
WRONG_IN_A_ROW = 50  # then nothing more is paid for: the model or the endpoint does not do what is asked


# --- What a right answer is


def read_json(answer: Answer) -> object:
    """The JSON of an answer, in a code fence or bare.

    Raises:
        ValueError: there is no answer, it is cut off, or it is not JSON alone; the message is the reason to count.
    """
    if answer.text is None or not answer.text.strip():
        raise ValueError("empty answer" if answer.finish in ("stop", "eos", "length") else answer.finish)
    if answer.finish == "length":
        raise ValueError("cut off at max_tokens")
    if answer.finish not in ("stop", "eos"):
        raise ValueError(f"ended by {answer.finish}")
    text = answer.text.strip()
    fenced = FENCE.match(text)
    try:
        return json.loads(fenced[1] if fenced else text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("not JSON alone") from None
    except json.JSONDecodeError:
        raise ValueError("not JSON alone") from None


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _no_constant(name: str):
    raise ValueError("not JSON alone")


def read_tasks(answer: Answer) -> list[str]:
    """The tasks of a brainstorm.

    Raises:
        ValueError: as `read_json`, or it is no list of texts.
    """
    content = read_json(answer)
    if not isinstance(content, list) or not content:
        raise ValueError("not a list of tasks")
    return [_text(task, "a task") for task in content]


def read_example(answer: Answer) -> dict[str, str]:
    """The three texts of an example.

    Raises:
        ValueError: as `read_json`, a text is missing, or two are the same.
    """
    content = read_json(answer)
    if not isinstance(content, dict) or sorted(content) != sorted(FIELDS):
        raise ValueError(f"not exactly {', '.join(FIELDS)}")
    texts = {name: _text(content[name], name) for name in FIELDS}
    if len({normalize(text) for text in texts.values()}) < len(FIELDS):
        raise ValueError("two of the texts are the same")
    return texts


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is empty or no text")
    try:
        check_characters(value, name)
    except ValueError:
        raise ValueError(f"{name} holds half a character or a NUL") from None
    return value.strip()


# --- The two steps


@dataclass(frozen=True)
class Settings:
    """
    Args:
        tasks: examples to make, over all kinds; one a task.
        attempts: answers to ask for until one is right.
        seed: of what the prompts vary.
    """

    tasks: int
    kinds: tuple[str, ...]
    seed: int = 42
    attempts: int = 3
    concurrency: int = 16


class Synthesis:
    """Asks for everything, reuses every kept answer, and counts what came back.

    Attributes:
        counts: answers by outcome, and what was dropped as a repetition.
        rejected: what got no right answer, with the reasons.
    """

    def __init__(self, writer: Writer, answers: Answers, settings: Settings, counts: Counter):
        self.writer, self.answers, self.settings, self.counts = writer, answers, settings, counts
        self.prompts = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
        self.free = asyncio.Semaphore(settings.concurrency)
        self.rejected: list[dict] = []
        self.tokens = [0, 0]
        self.wrong_in_a_row = Counter()  # of each step: right tasks do not make up for wrong examples

    async def ask(self, place: str, prompt: str, read: Callable[[Answer], object]) -> object | None:
        """What `read` makes of the first right answer; None if no attempt gives one.

        Raises:
            ValueError: so many new answers in a row were wrong that more would be, too.
        """
        reasons = []
        for attempt in range(self.settings.attempts):
            of_run = [self.writer.name, self.writer.options, self.settings.seed]
            identity = json.dumps([*of_run, place, attempt, prompt])
            key = hashlib.sha256(identity.encode()).hexdigest()
            is_new = (answer := self.answers.known.get(key)) is None
            if is_new:
                async with self.free:
                    answer = await self.writer.answer(prompt, int(key[:7], 16))
                self.answers.add(key, answer)
                self.counts["answers asked for"] += 1
            else:
                self.counts["answers kept from before"] += 1
            self.tokens[0] += answer.tokens_in
            self.tokens[1] += answer.tokens_out
            try:
                result = read(answer)
            except ValueError as error:
                self.counts[f"wrong answer: {error}"] += 1
                reasons.append(str(error))
                self.wrong_in_a_row[read] += is_new
                if self.wrong_in_a_row[read] == WRONG_IN_A_ROW:
                    raise ValueError(
                        f"{WRONG_IN_A_ROW} answers of {self.writer.name} in a row were wrong, the last because: "
                        f"{error}; see {self.answers.path}. Nothing more is asked: is it tuned to follow instructions?"
                    ) from None
            else:
                self.counts["right answers"] += 1
                self.wrong_in_a_row[read] = 0
                return result
        self.rejected.append({"place": place, "prompt": prompt, "reasons": reasons})
        self.counts["set aside"] += 1
        return None

    async def brainstorm(self, kind: str, count: int) -> list[str]:
        """`count` distinct tasks, or fewer if three rounds of calls in a row bring no new one."""
        rng = random.Random(f"{self.settings.seed} {kind}")
        tasks: dict[str, str] = {}
        calls = fruitless = 0
        while len(tasks) < count and fruitless < 3:
            wanted = -(-(count - len(tasks)) // TASKS_PER_CALL)
            prompts = []
            for _ in range(wanted):
                subject = rng.choice(self.prompts["vary"]["subject"])
                fill = {"count": TASKS_PER_CALL, "kind": self.prompts["kinds"][kind]["tasks"], "subject": subject}
                prompts.append((f"tasks {kind} {calls}", self.prompts["brainstorm"].format(**fill)))
                calls += 1
            found = await _gather([self.ask(place, prompt, read_tasks) for place, prompt in prompts])
            before = len(tasks)
            for task in (task for its in found for task in its or ()):
                self.counts["repeated tasks"] += normalize(task) in tasks
                tasks.setdefault(normalize(task), task)
            fruitless = fruitless + 1 if len(tasks) == before else 0
        self.counts["tasks lacking"] += max(0, count - len(tasks))
        return list(tasks.values())[:count]

    async def example(self, kind: str, number: int, task: str) -> dict | None:
        """A triplet for the task."""
        rng = random.Random(f"{self.settings.seed} {kind} {number} {task}")
        varied = {name: rng.choice(values) for name, values in self.prompts["vary"].items()}
        described = {name: self.prompts["kinds"][kind][name].format(**varied) for name in ("query", "document")}
        prompt = self.prompts["example"].format(task=task, **(varied | described))
        texts = await self.ask(f"example {kind} {number}", prompt, read_example)
        if texts is None:
            return None
        return {
            "query": texts["user_query"],
            "positive": texts["positive_document"],
            "negatives": [texts["hard_negative_document"]],
            "instruction": task,
            "symmetric": False,
            "dataset": f"synthetic-{kind}",
        }

    async def run(self) -> list[dict]:
        """The triplets of all kinds, in order, without repeated queries."""
        share, rest = divmod(self.settings.tasks, len(self.settings.kinds))
        triplets: dict[str, dict] = {}
        with tqdm(total=self.settings.tasks, desc="Synthesizing", unit="example") as progress:

            async def one(kind: str, number: int, task: str) -> dict | None:
                triplet = await self.example(kind, number, task)
                progress.update()
                progress.set_postfix({"tokens in": self.tokens[0], "out": self.tokens[1]}, refresh=False)
                return triplet

            for place, kind in enumerate(self.settings.kinds):
                tasks = await self.brainstorm(kind, share + (place < rest))
                for triplet in await _gather([one(kind, number, task) for number, task in enumerate(tasks)]):
                    if triplet is None:
                        continue
                    query = normalize(triplet["query"])
                    self.counts["repeated queries"] += query in triplets
                    triplets.setdefault(query, triplet)
        self.counts["triplets"] = len(triplets)
        return list(triplets.values())


async def _gather(coroutines: Sequence) -> list:
    """The results in order; the first error stops the others, whose answers so far are kept."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
    return [task.result() for task in tasks]


def synthesize(writer: Writer, output: Path, settings: Settings, counts: Counter, prices=None) -> dict:
    """Writes `train.jsonl`, `rejected.jsonl` and `report.json`; returns the report.

    Args:
        prices: dollars for a million tokens read, and written; None: unknown.

    Raises:
        ConnectionError: as `Endpoint`.
        ValueError: as `Answers` and `Synthesis.ask`.
    """
    synthesis = Synthesis(writer, Answers(output / "answers.jsonl"), settings, counts)
    try:
        triplets = asyncio.run(synthesis.run())
    except ExceptionGroup as group:
        raise _first(group) from group
    finally:
        synthesis.answers.file.close()
    for name, rows in (("train.jsonl", triplets), ("rejected.jsonl", synthesis.rejected)):
        with whole(output / name) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokens_in, tokens_out = synthesis.tokens
    report = {
        "model": writer.name,
        "settings": asdict(settings),
        "counts": dict(sorted((+counts).items())),
        "tokens": {"in": tokens_in, "out": tokens_out},
        "dollars": prices and round((tokens_in * prices[0] + tokens_out * prices[1]) / 1e6, 4),
    }
    write_json(output / "report.json", report)
    return report


def _first(group: ExceptionGroup) -> Exception:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


def main() -> None:
    kinds = list(yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))["kinds"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder to write to; run again to go on")
    parser.add_argument("--tasks", type=int, required=True, help="tasks over all kinds, one example each")
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--endpoint", help="base address of an OpenAI-compatible endpoint, ending in /v1")
    parser.add_argument("--model", help="name of the endpoint's model")
    parser.add_argument("--local_model", help="instead: a chat model that transformers runs here")
    parser.add_argument("--max_tokens", type=int, default=2048, help="of an answer")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--attempts", type=int, default=3, help="answers to ask for until one is right")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time")
    parser.add_argument("--requests_per_minute", type=float)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for an answer")
    parser.add_argument("--prices", type=float, nargs=2, help="dollars a million tokens in, out")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if (args.endpoint is None) == (args.local_model is None) or (args.endpoint and not args.model):
        parser.error("give either --endpoint and --model, or --local_model")
    for name in ("tasks", "attempts", "concurrency", "max_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be 1 or more")
    if args.requests_per_minute is not None and not args.requests_per_minute > 0:
        parser.error(f"--requests_per_minute is {args.requests_per_minute}; it must be above 0")
    counts = Counter()
    settings = Settings(args.tasks, tuple(args.kinds), args.seed, args.attempts, args.concurrency)
    try:
        if args.endpoint is not None:
            options = (args.requests_per_minute, args.timeout, 6, args.max_tokens, args.temperature)
            writer = Endpoint(args.endpoint, args.model, counts, *options)
        else:
            writer = LocalModel(args.local_model, args.max_tokens, args.temperature)
        report = synthesize(writer, Path(args.output_dir), settings, counts, args.prices)
    except (ConnectionError, ValueError) as error:
        sys.exit(f"synthesize: {error}")
    print(json.dumps(report, indent=1, ensure_ascii=False))
    made, set_aside = (report["counts"].get(name, 0) for name in ("triplets", "set aside"))
    print(
        f"{made:,} triplets in {Path(args.output_dir, 'train.jsonl')}; {set_aside:,} set aside in rejected.jsonl, "
        "asked again with higher --attempts",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
