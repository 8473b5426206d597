"""The instructions of queries and documents: one per task, as in the paper's evaluation (section 5.1).

`instructions.json` says where each comes from: the released list, the public list that it follows, or, for tasks that
the paper does not have (RTEB's and BRIGHT's), ourselves.
"""

import json
import re
from dataclasses import dataclass
from importlib.resources import files

from nvembed.texts_nvembed import format_instruction


@dataclass(frozen=True)
class TaskInstruction:
    """Task definitions, without "Instruct:"; "" for none.

    Args:
        query: for queries, and for every text of a task that has no queries, such as clustering.
        document: for documents of retrieval; equals `query` in symmetric tasks.
    """

    query: str
    document: str = ""


def known_instructions() -> dict[str, TaskInstruction]:
    """The instructions by task; the released names "STS" and "SUMM" stand for all tasks of these types."""
    entries = json.loads((files("nvembed.eval.tasks") / "instructions.json").read_text())
    return {
        name: TaskInstruction(entry["query"], entry["query"] if entry.get("symmetric") else entry["corpus"])
        for name, entry in entries.items()
    }


def find_instruction(name: str, task_type: str) -> TaskInstruction | None:
    """The instruction for one of mteb's tasks, the paper's where it has one; None if there is none.

    Later variants (`.v2`, `HardNegatives`, `ArXivHierarchical`, BRIGHT's `Long` and `Pro`, parts of CQADupstack) get
    the first data set's.
    """
    known = known_instructions()
    stem = re.sub(r"\.v\d+$", "", name)
    stem = re.sub(r"HardNegatives$", "", stem).replace("ArXivHierarchical", "Arxiv")
    stem = re.sub(r"^CQADupstack\w+Retrieval$", "CQADupstackRetrieval", stem)
    stem = re.sub(r"^Bright(?:Pro)?(\w*?)(?:Long)?Retrieval$", r"Bright\1Retrieval", stem)
    by_type = {"STS": "STS", "Summarization": "SUMM"}.get(task_type, "")
    for key in (name, stem, stem.removesuffix("Retrieval"), by_type):
        if key in known:
            return known[key]
    return None


def task_prompts() -> dict[str, str]:
    """The instructions by task, for `config.prompts`; "<task>-document" is empty where documents carry none.

    mteb needs the second name: it would use a prompt under the task's bare name for documents as well.
    """
    prompts = {}
    for task, instruction in known_instructions().items():
        prompts[task] = format_instruction(instruction.query)
        if not instruction.document:
            prompts[f"{task}-document"] = ""
    prompts["Summarization"] = prompts["SUMM"]  # mteb's name of the released SUMM
    return prompts
