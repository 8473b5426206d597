import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from nvembed.eval.commands import STAGES
from nvembed.train.arguments import DataArguments, ModelArguments, Stage1Arguments, Stage2Arguments
from nvembed.train.compress.prune import PruneArguments
from nvembed.train.compress.quantize import QuantizeArguments
from nvembed.train.data.sets import as_source
from nvembed.train.data.source import DatasetSource, check_exists, check_sources
from nvembed.train.distill_arguments import DistillArguments
from nvembed.train.recipe import RecipeParser


RECIPES = Path(__file__).parents[2] / "train" / "recipes"

RECIPE = """
output_dir: {out}
instruction: For all
temperature: 0.05
datasets:
  - path: a
    kind: sts
    instruction: Its own
  - path: b/c.jsonl
    samples: 5
"""


def parse(tmp_path, text, *arguments, stage=Stage1Arguments):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.format(out=tmp_path / "out"))
    parser = RecipeParser(ModelArguments, DataArguments, stage)
    return parser.parse_args_and_config(["--config", str(recipe), *arguments])


def test_recipe_and_command_line(tmp_path):
    model_args, data_args, training_args = parse(tmp_path, RECIPE, "--temperature", "0.1", "--eval_steps", "7")
    assert data_args.datasets == [
        DatasetSource("a", "sts", instruction="Its own", name="a"),
        DatasetSource(str(tmp_path / "b" / "c.jsonl"), samples=5, name="c"),
    ]
    assert training_args.temperature == 0.1, "the command line outranks the recipe"
    assert training_args.eval_strategy == "steps"
    assert training_args.in_batch_negatives
    assert (model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout) == (16, 32, 0.1)
    assert not parse(tmp_path, RECIPE, stage=Stage2Arguments)[2].in_batch_negatives


def test_paths_of_data_start_at_the_recipe(tmp_path, monkeypatch):
    """A local file or folder beside the recipe, else a Hub name; on the command line, the working directory."""
    (tmp_path / "a").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    text = "output_dir: {out}\nmodel_name_or_path: base\neval_tasks: t.yaml\n"
    text += "datasets: [a, org/set, ../x, {{path: sub/t.csv}}]\n"
    model_args, data_args, _ = parse(tmp_path, text)
    paths = [source.path for source in data_args.datasets]
    assert paths == [str(tmp_path / "a"), "org/set", str(tmp_path.parent / "x"), str(tmp_path / "sub" / "t.csv")]
    assert data_args.eval_tasks == str(tmp_path / "t.yaml")
    assert model_args.model_name_or_path == "base"
    assert parse(tmp_path, text, "--datasets", "a", "--eval_tasks", "t.yaml")[1].datasets[0].path == "a"
    with pytest.raises(ValueError, match="x does not exist; in a recipe, relative paths start at the recipe's folder"):
        check_exists(data_args.datasets[2])
    (tmp_path / "here" / "org" / "set").mkdir(parents=True)
    with pytest.raises(ValueError, match="'org/set' is in the working directory, .* start: write here/org/set"):
        parse(tmp_path, text)


def test_recipes_name_models_and_outputs_by_the_working_directory():
    for path in RECIPES.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        for part in (content, content.get("stage1", {}), content.get("stage2", {})):
            for key in ("model_name_or_path", "output_dir"):
                assert part.get(key, "runs/").startswith("runs/"), path


def test_a_link_keeps_its_own_name(tmp_path):
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "squad.jsonl").symlink_to("blob")
    _, data_args, _ = parse(tmp_path, "output_dir: {out}\ndatasets: squad.jsonl\n")
    assert (data_args.datasets[0].path, data_args.datasets[0].name) == (str(tmp_path / "squad.jsonl"), "squad")


def test_recipes_are_known_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = RecipeParser(ModelArguments, DataArguments, Stage2Arguments)
    _, data_args, training_args = parser.parse_args_and_config(["--config=smollm2", "--bf16=false"])
    assert training_args.learning_rate == 5e-4
    assert len(data_args.datasets) == 8
    parser = RecipeParser(ModelArguments, DataArguments, Stage1Arguments)
    with pytest.raises(ValueError, match="--config is given more than once"):
        parser.parse_args_and_config(["--config", "smollm2", "--config=finetune"])
    with pytest.raises(ValueError, match="--config smollm is neither a file nor .* recipe; the recipes are compress, "):
        parser.parse_args_and_config(["--config", "smollm"])


def test_one_recipe_for_both_stages(tmp_path):
    both = RECIPE + "stage1: {{learning_rate: 0.1}}\nstage2: {{learning_rate: 0.2, temperature: 0.3}}\n"
    first, second = (parse(tmp_path, both, stage=stage)[2] for stage in (Stage1Arguments, Stage2Arguments))
    assert (first.learning_rate, first.temperature) == (0.1, 0.05)
    assert (second.learning_rate, second.temperature) == (0.2, 0.3)
    assert parse(tmp_path, both, "--learning_rate", "0.4")[2].learning_rate == 0.4
    with pytest.raises(ValueError, match="the recipe has stage2 and no stage1: run train/stage2.py"):
        parse(tmp_path, RECIPE + "stage2: {{learning_rate: 0.2}}\n")
    with pytest.raises(ValueError, match=r"Unknown arguments from config file: \['--lerning_rate'"):
        parse(tmp_path, RECIPE + "stage1: {{lerning_rate: 0.2}}\n")
    with pytest.raises(ValueError, match="stage1 is 5 in the recipe"):
        parse(tmp_path, RECIPE + "stage1: 5\n")


def test_sets_are_left_out_by_name(tmp_path):
    recipe = "datasets: [{path: a, weight: 1}, {path: b, weight: 2, name: bee}]\ninstruction: x\n"
    (tmp_path / "r.yaml").write_text(recipe)

    def read(*names):
        parser = RecipeParser(ModelArguments, DataArguments, Stage2Arguments)
        options = [
            "--config",
            str(tmp_path / "r.yaml"),
            "--output_dir",
            "o",
            "--use_cpu",
            "true",
            "--leave_out",
            *names,
        ]
        return parser.parse_args_and_config([*options, "--leave_out", *names])[1]

    assert [source.name for source in read("bee").datasets] == ["a"] and read("bee").weights == [1]
    with pytest.raises(ValueError, match="leave_out has 'b', which is none of the datasets: a, bee"):
        read("b")


@pytest.mark.parametrize("value", ["--in_batch_negatives", "true", "True", "labels", "sets", "false"])
def test_in_batch_negatives_have_four_settings(tmp_path, value):
    options = [value] if value.startswith("--") else ["--in_batch_negatives", value]
    expected = {"labels": "labels", "sets": "sets", "false": False}.get(value, True)
    for stage in (Stage1Arguments, Stage2Arguments):
        assert parse(tmp_path, RECIPE, *options, stage=stage)[2].in_batch_negatives == expected
        in_recipe = RECIPE + f"in_batch_negatives: {str(expected).lower()}\n"
        assert parse(tmp_path, in_recipe, stage=stage)[2].in_batch_negatives == expected
    with pytest.raises(ValueError, match="in_batch_negatives is 'some'; it must be true, false, labels or sets"):
        parse(tmp_path, RECIPE, "--in_batch_negatives", "some")
    with pytest.raises(ValueError, match="--no_in_batch_negatives is now --in_batch_negatives false"):
        parse(tmp_path, RECIPE, "--no_in_batch_negatives")
    with pytest.raises(ValueError, match="spread_out_weight is -1.0; it must be 0"):
        parse(tmp_path, RECIPE, "--spread_out_weight", "-1")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_read_and_names_what_it_trains_on(tmp_path, path, monkeypatch):
    content = yaml.safe_load(path.read_text())
    if "tasks" in content or path.stem.endswith("-data"):
        pytest.skip("no recipe of a training")
    monkeypatch.chdir(path.parents[2])
    steps = {"stage1": Stage1Arguments, "stage2": Stage2Arguments, "distill": DistillArguments}
    here = [name for name in steps if name in content or name in path.stem]
    entries = [entry for part in (content, *map(content.get, here)) for entry in (part or {}).get("datasets", [])]
    built = [entry["set"] for entry in entries if isinstance(entry, dict) and "set" in entry]
    for name in built:
        (tmp_path / name).mkdir(exist_ok=True)  # as build_data.py would, with the instructions in the rows
    if not content.keys() & {*STAGES}:
        here = here or ["stage1"]  # a recipe of one step, which its name tells
    for name in here:
        parser = RecipeParser(ModelArguments, DataArguments, steps[name])
        on_cpu = ["--bf16=false", "--use_cpu=true", "--optim=adamw_torch"]
        on_cpu += [f"--data_dir={tmp_path}"] if "data_dir" in content else []
        _, data_args, training_args = parser.parse_args_and_config(["--config", str(path), *on_cpu])
        for source in check_sources(data_args.datasets):
            has_instruction = source.instruction is not None or source.set is not None or source.name in built
            assert source.kind is not None and has_instruction, source
        assert training_args.warmup_steps and training_args.output_dir.startswith("runs/")
        if path.stem.startswith("paper"):
            assert training_args.per_device_train_batch_size == 128, "of one process"
    for name, step in (("prune", PruneArguments), ("quantize", QuantizeArguments)):
        if name in content:
            (args,) = RecipeParser(step).parse_args_and_config(["--config", str(path)])
            assert args.datasets and args.output_dir.startswith("runs/")


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-4b", "qwen2.5-3b", "llama-3.2-3b", "stock-servers"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_recipes_of_other_bases_have_the_papers_settings(name, stage):
    content, paper = (yaml.safe_load((RECIPES / f"{file}.yaml").read_text()) for file in (name, f"paper-{stage}"))
    own = {
        "output_dir",
        "model_name_or_path",
        "is_mask_instruction",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "temperature",
    }
    told = {key: value for key, value in content.items() if key not in ("stage1", "stage2")} | content[stage]
    for key in told.keys() | paper.keys():
        assert key in own or told.get(key) == paper.get(key), key


@pytest.mark.parametrize("name, sets", [("paper-stage1", 3), ("paper-stage2", 4), ("paper-data", 4)])
def test_sets_in_comments_can_be_uncommented(name, sets):
    text = (RECIPES / f"{name}.yaml").read_text()
    entries = re.findall(r"  # (- \{.*?\})\n", text, re.DOTALL)
    sources = [as_source(yaml.safe_load(entry.replace("\n  #", "\n"))[0]) for entry in entries]
    assert len(check_sources(sources)) == sets
    assert all(source.path.startswith("data/") and source.samples for source in sources)


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    assert config.num_processes == {"one-gpu": 1, "multi-node": 16}.get(path.stem, 8)


def test_a_batch_size_is_of_all_processes_and_steps(tmp_path):
    text = "output_dir: {out}\nbatch_size: 12\ngradient_accumulation_steps: 3\n"
    assert parse(tmp_path, text)[2].per_device_train_batch_size == 4


def test_one_dataset_needs_no_list(tmp_path):
    for text in ("datasets: a.jsonl", "datasets: {{path: a.jsonl}}"):
        assert parse(tmp_path, "output_dir: {out}\n" + text)[1].datasets == [DatasetSource(str(tmp_path / "a.jsonl"))]


def test_datasets_on_the_command_line_are_paths(tmp_path):
    _, data_args, _ = parse(tmp_path, "output_dir: {out}\n", "--datasets", "x.jsonl", "y")
    assert data_args.datasets == [DatasetSource("x.jsonl"), DatasetSource("y")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("temprature: 1\n", r"Unknown arguments from config file: \['--temprature', '1'\]"),
        ("datasets: [{{path: a, sampels: 3}}]\n", "has unknown key 'sampels'; an entry has path and, as needed, kind"),
        ("datasets: [{{kind: sts}}]\n", "has no path"),
        ("datasets: 5\n", "datasets is 5, not a list"),
        ("datasets: [null]\n", "None is neither a mapping with a path nor a path"),
        ("datasets: [{{path: a, samples: five}}]\n", "samples is 'five' of type str"),
        ("datasets: [{{path: a, symmetric: maybe}}]\n", "symmetric is 'maybe' of type str"),
        ("batch_size: 10\ngradient_accumulation_steps: 3\n", r"batch_size is 10, .*do not divide .* 9 would do"),
        ("chunk_tokens: 0\n", "chunk_tokens is 0"),
        ("max_length: 0\n", "max_length is 0"),
        ("num_negatives: 1.5\n", "num_negatives is 1.5"),
        ("temperature: 0\n", "temperature is 0"),
        ("temperature: .inf\n", "temperature is inf; it must be > 0, and finite"),
        (
            "matryoshka_dims: [8, 4]\nmatryoshka_weights: [1, .nan]\n",
            "matryoshka_weights is .*; each needs one above 0",
        ),
        ("model_name_or_path: .\nmodel_revision: v2\n", "revision 'v2' is asked for of ., which is a folder"),
        ("num_negatives: -1\n", "num_negatives is -1"),
        ("eval_names: [a]\n", r"eval_names is \['a'\] but there is no eval_tasks"),
    ],
)
def test_bad_recipes_are_named(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        parse(tmp_path, "output_dir: {out}\n" + text)
