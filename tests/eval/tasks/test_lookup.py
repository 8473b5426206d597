"""What `--tasks` names, and which instruction each task gets: mteb's own list walked."""

import json
from importlib.resources import files

import mteb
import pytest

from nvembed.eval.tasks.instructions import TaskInstruction, find_instruction, known_instructions
from nvembed.eval.tasks.lookup import PAPER_BENCHMARK, instructions_for, select_tasks, with_parts
from tests.triplets import write_similarity_task


@pytest.mark.slow
def test_every_task_of_the_paper_has_an_instruction(caplog):
    tasks = select_tasks([PAPER_BENCHMARK])
    assert len(tasks) == 56
    instructions = instructions_for(tasks)
    assert caplog.text == "", "no default is used"
    assert len(list(with_parts(tasks))) == len(instructions) == 68, "with CQADupstack's twelve forums"
    assert all(instruction.query for instruction in instructions.values())
    known = known_instructions()
    for task in tasks:
        name, kind = task.metadata.name, task.metadata.type
        key = {"STS": "STS", "Summarization": "SUMM"}.get(kind, name)
        assert instructions[name] == known[key]
        symmetric = kind != "Retrieval" or name == "QuoraRetrieval"
        assert instructions[name].document == (instructions[name].query if symmetric else "")
    assert instructions["CQADupstackGisRetrieval"] == known["CQADupstackRetrieval"]
    languages = {subset for task in tasks for subset in task.hf_subsets}
    assert languages == {"default", "en", "en-en"}


def test_some_tasks_of_all_are_taken_by_their_names(tmp_path):
    """Of a file, the data of others is not even read."""
    some = select_tasks([PAPER_BENCHMARK], ["STS12", "SciFact"])
    assert sorted(task.metadata.name for task in some) == ["STS12", "SciFact"]
    with pytest.raises(ValueError, match="--task_names 'STS21' is none of the tasks, which are .*STS12"):
        select_tasks([PAPER_BENCHMARK], ["STS12", "STS21"])
    write_similarity_task(tmp_path, "pairs", ["one", "two two", "three"])
    (tmp_path / "empty").mkdir()
    file = tmp_path / "tasks.yaml"
    file.write_text(file.read_text()[:-1] + ", {type: STS, path: empty, instruction: Retrieve similar text}]")
    assert [task.metadata.name for task in select_tasks([str(file)], ["pairs"])] == ["pairs"]
    with pytest.raises(ValueError, match="--task_names 'pears' is none of the tasks, which are pairs, empty"):
        select_tasks([str(file)], ["pears"])


def test_every_task_of_todays_benchmarks_has_an_instruction():
    """mteb's lists walked: MTEB(eng), RTEB in all languages and domains, BRIGHT in all versions; ours are marked so."""
    missing, benchmarks = set(), [b for b in mteb.get_benchmarks() if b.name.startswith(("MTEB(eng", "RTEB", "BRIGHT"))]
    assert len(benchmarks) > 10
    for benchmark in benchmarks:
        for task in with_parts(benchmark.tasks):
            if find_instruction(task.metadata.name, task.metadata.type) is None:
                missing.add(task.metadata.name)
    assert not missing
    entries = json.loads((files("nvembed.eval.tasks") / "instructions.json").read_text())
    ours = {name for name, entry in entries.items() if "not in the paper" in entry["source"]}
    papers = {name for name, entry in entries.items() if name not in ours}
    assert len(papers) == 47 and {"AppsRetrieval", "BrightBiologyRetrieval"} <= ours
    assert find_instruction("BrightProBiologyRetrieval", "Retrieval") == find_instruction(
        "BrightBiologyLongRetrieval", "Retrieval"
    )


def test_later_variants_have_the_instruction_of_the_first(caplog):
    names = [
        "ClimateFEVERHardNegatives",
        "Touche2020Retrieval.v3",
        "TwentyNewsgroupsClustering.v2",
        "ArXivHierarchicalClusteringP2P",
    ]
    instructions, known = instructions_for(select_tasks(names)), known_instructions()
    expected = ["ClimateFEVER", "Touche2020", "TwentyNewsgroupsClustering", "ArxivClusteringP2P"]
    assert [instructions[name] for name in names] == [known[name] for name in expected]
    assert caplog.text == ""


def test_a_task_without_an_instruction_has_mtebs_default_with_a_warning(caplog, data):
    (task,) = select_tasks(["LEMBPasskeyRetrieval"])
    instruction = instructions_for([task])["LEMBPasskeyRetrieval"]
    assert instruction == TaskInstruction("Retrieve text based on user query.", "")
    assert "LEMBPasskeyRetrieval has no instruction; mteb's default is used: 'Retrieve text based" in caplog.text
    (task,) = select_tasks(["News21InstructionRetrieval"])
    assert instructions_for([task])["News21InstructionRetrieval"].document == "", "whatever the type is called"
    (data / "tasks.yaml").write_text("tasks: [{type: Clustering, path: clustering}]")
    instruction = instructions_for(select_tasks([str(data / "tasks.yaml")]))["clustering"]
    assert instruction == TaskInstruction(*["Identify categories in user passages."] * 2)
    assert "clustering has no instruction; mteb's default is used" in caplog.text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SciFcat", "'SciFcat' is neither a benchmark nor a task of mteb .*, nor a .yaml file; near are 'SciFact'"),
        ("mteb(eng", r"near are .*'MTEB\(eng, v1\)'"),
        ("banking77", "near are 'Banking77Classification'"),
        ("qqqqzzzz", "nothing has a name like it"),
    ],
)
def test_unknown_tasks_get_the_nearest_names(name, words):
    with pytest.raises(ValueError, match=words):
        select_tasks([name])


def test_a_local_task_with_the_name_of_another(data):
    (data / "tasks.yaml").write_text("tasks: [{type: STS, path: sts, name: STS12}]")
    with pytest.raises(ValueError, match="two tasks are called 'STS12'; give the local one another"):
        select_tasks(["STS12", str(data / "tasks.yaml")])
    assert len(select_tasks(["STS12", "STS12"])) == 1
    for name, instruction in (("a", "One"), ("b", "Two")):
        (data / f"{name}.yaml").write_text(f"tasks: [{{type: STS, path: sts, instruction: {instruction}}}]")
    with pytest.raises(ValueError, match="two tasks are called 'sts'"):
        select_tasks([str(data / "a.yaml"), str(data / "b.yaml")])
    assert len(select_tasks([str(data / "a.yaml")] * 2)) == 1
