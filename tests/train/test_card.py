"""What a card takes over from the card of its base."""

from types import SimpleNamespace

from huggingface_hub import ModelCard
from PIL import Image

from nvembed.train.card import (
    TrainingRun,
    continue_card,
    evaluation_table,
    is_hub_name,
    last_scores,
    write_base_card,
    write_card,
)
from nvembed.train.certificate import write_certificate
from nvembed.train.data.source import DatasetSource


def make_run(stage: str, base: str, **overrides) -> TrainingRun:
    example = {"query": "q", "positive": "p", "negatives": [], "instruction": "Find", "symmetric": True}
    fields = {
        "sources": [DatasetSource("org/questions", instruction="Find"), DatasetSource("own.jsonl", instruction="")],
        "kinds": ["retrieval", "triplets"],
        "instructions": ["Find", ""],
        "triplets": [12345, 7],
        "samples": [640, 3],
        "example": example,
        "settings": {"learning_rate": "2e-05"},
        "history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "train_runtime": 120.0}],
        "tasks": [],
    }
    return TrainingRun(stage=stage, base=base, **(fields | overrides))


def test_a_stage_takes_its_bases_account_over(tmp_path):
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
    write_base_card(tmp_path / "base", "org/decoder-7b")
    write_card(tmp_path / "one", make_run("stage1", str(tmp_path / "base")), "runs/one")
    write_card(tmp_path / "two", make_run("stage2", str(tmp_path / "one")), "org/two")
    card = ModelCard.load(tmp_path / "two" / "README.md")
    assert card.data.base_model == "org/decoder-7b", "the decoder, through two local folders"
    assert card.data.datasets == ["org/questions"]
    text = card.text
    assert text.count("## Training\n") == 1
    assert text.index("### stage1") < text.index("(loss_stage1.png)") < text.index("### stage2")
    assert (tmp_path / "two" / "loss_stage1.png").read_bytes() == (tmp_path / "one" / "loss_stage1.png").read_bytes()
    assert "| org/questions | retrieval | Find | 12,345 | 640 |" in text
    assert "| own | triplets | - | 7 | 3 |" in text
    assert "2.0 minutes" in text
    assert "passages = model.encode(['p'], instruction='Instruct: Find\\nQuery: ')" in text, "symmetric"


def test_a_stage_on_top_of_the_same_stage_keeps_both_curves(tmp_path):
    for name in ("one", "two", "none"):
        (tmp_path / name).mkdir()
    write_card(tmp_path / "one", make_run("stage1", "org/decoder"), "one")
    history = [{"step": 1, "loss": 9.0}, {"step": 5, "loss": 8.0}]
    write_card(tmp_path / "two", make_run("stage1", str(tmp_path / "one"), history=history), "two")
    text = (tmp_path / "two" / "README.md").read_text()
    assert text.index("### stage1\n") < text.index("(loss_stage1.png)") < text.index("### stage1 (2)\n")
    assert text.index("### stage1 (2)\n") < text.index("(loss_stage1_2.png)")
    first = (tmp_path / "one" / "loss_stage1.png").read_bytes()
    assert first == (tmp_path / "two" / "loss_stage1.png").read_bytes()
    assert first != (tmp_path / "two" / "loss_stage1_2.png").read_bytes()
    assert "Mean cosine" not in text, "an earlier version's log has none"
    assert "GB of memory" not in text, "nor that"
    history = [
        {"step": step, "loss": 9.0, "mean_cosine": x, "effective_rank": 90.4, "peak_memory_gb": memory}
        for step, x, memory in ((1, 0.9, 6.64), (5, 0.2, 5.0))  # resumed between
    ]
    (tmp_path / "three").mkdir()
    write_card(tmp_path / "three", make_run("stage1", "org/decoder", history=history), "three")
    text = (tmp_path / "three" / "README.md").read_text()
    assert "; at most 6.6 GB of memory a process, of its GPU if it had one." in text
    assert (
        "unrelated queries: 0.90 at step 1, 0.20 at step 5; effective rank of texts of the steps before 90, then 90."
        in text
    )
    heights = [Image.open(tmp_path / name / "loss_stage1.png").height for name in ("one", "three")]
    assert heights == [round(120 * (2.2 * curves + 0.6)) for curves in (1, 3)], "how they crowd is drawn, too"
    write_card(tmp_path / "none", make_run("stage1", "org/decoder", history=[]), "none")
    assert "![" not in (tmp_path / "none" / "README.md").read_text(), "no loss was logged, no curve"


def test_scores_are_those_of_the_step_that_is_saved():
    task = SimpleNamespace(metadata=SimpleNamespace(name="sts", main_score="cosine_spearman"))
    history = [{"step": step, "eval_sts": score} for step, score in ((2, 0.5), (4, 0.9), (6, 0.1))]
    best = make_run("stage1", "org/decoder", history=history, tasks=[task], saved_step=4)
    assert last_scores(best) == {"sts": 0.9}
    assert "step 6" not in evaluation_table(best) and "| 50.00 | 90.00 |" in evaluation_table(best)
    assert last_scores(make_run("stage1", "org/decoder", history=history, tasks=[task])) == {"sts": 0.1}


def test_a_base_without_a_card_or_with_a_broken_one_is_no_obstacle(tmp_path):
    (tmp_path / "out").mkdir()
    write_card(tmp_path / "out", make_run("stage1", str(tmp_path / "nowhere")), "mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "README.md").write_text("---\nlicense: [\n---\n# Mine\n")
    write_card(tmp_path / "out", make_run("stage1", str(tmp_path / "broken")), "mine")
    assert "base_model" not in ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()


def test_the_bases_license_stays(tmp_path):
    for name in ("base", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\nbase_model: org/x\n---\n# NV\n")
    write_card(tmp_path / "out", make_run("stage1", str(tmp_path / "base")), "mine")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.license, data.base_model) == ("cc-by-nc-4.0", "org/x")


def test_names_may_end_with_a_slash(tmp_path):
    for name in ("base", "out"):
        (tmp_path / name).mkdir()
    base = f"{tmp_path}/base/"
    write_card(tmp_path / "base", make_run("stage1", "org/decoder"), base)
    card = ModelCard.load(tmp_path / "base" / "README.md")
    assert card.data.model_name == "base" and "# base\n" in card.text and f'("{tmp_path}/base"' in card.text
    continue_card(base, None, tmp_path / "out", "runs/out/", "prune", "Pruned.")
    continued = ModelCard.load(tmp_path / "out" / "README.md")
    assert continued.data.model_name == "out"
    usage, _, training = continued.text.partition("## Training")
    assert "# out\n" in usage and '("runs/out"' in usage and "base" not in usage and "Pruned." in training


def test_a_continued_card_loads_the_new_model_and_names_its_data(tmp_path):
    """Whatever the base's card calls it: its name on the Hub, or another path to it."""
    for name in ("base", "out", "theirs"):
        (tmp_path / name).mkdir()
    sets = [{"name": "x", "mteb": ["STS12"]}]
    certificate = {"complete": True, "base": "b", "stages": [{"stage": "stage1", "sets": sets}]}
    write_card(tmp_path / "base", make_run("stage1", "org/decoder", certificate=certificate), "me/model")
    sets[0]["mteb"] = ["STS13"]
    write_certificate(tmp_path / "out", certificate)
    continue_card(str(tmp_path / "base"), None, tmp_path / "out", "runs/out", "merge", "Merged.")
    card = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "# out\n" in card and card.count('("runs/out"') == 2 and "me/model" not in card and "# model" not in card
    assert card.count("## Training data") == 1 and '"STS13"' in card and '"STS12"' not in card
    text = (
        '---\nmodel_name: x\n---\n# x\n\nfrom_pretrained("org/x"), from_pretrained("org/y")\n\n## Training data\n\nA.'
    )
    (tmp_path / "theirs" / "README.md").write_text(f"{text}\n\n## Limits\n\nMany.\n")
    continue_card(str(tmp_path / "theirs"), None, tmp_path / "out", "runs/out", "prune", "Pruned.")
    card = ModelCard.load(tmp_path / "out" / "README.md").text
    assert 'from_pretrained("org/y")' in card and "## Limits\n\nMany." in card and "\nA." not in card


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "there").mkdir(parents=True)
    assert is_hub_name("org/model-v1.0")
    assert not any(map(is_hub_name, ["org/there", "model", "/tmp/x/y", "../x", "a/b/c", "data/x y"]))
