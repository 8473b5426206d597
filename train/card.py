"""The model card of a training run: base, data, settings and scores."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mteb.abstasks import AbsTask
from transformers import TrainerState
from transformers.utils.logging import get_logger
from yaml import YAMLError

from nvembed.eval.markdown_table import markdown_table
from nvembed.eval.results import describe, eval_results
from nvembed.eval.training_data import FILE, is_seen, mark, read_training_data, training_datasets
from nvembed.texts_nvembed import format_instruction
from nvembed.train.arguments import DataArguments, StageArguments
from nvembed.train.checkpoints import CARD
from nvembed.train.data.blend import Blend
from nvembed.train.data.kinds import kind_of
from nvembed.train.data.source import DatasetSource
from nvembed.train.resume import NOT_RECORDED, RunRecord


logger = get_logger(__name__)

TRAINING_DATA = "\n## Training data\n"  # of all stages
TRAINING = "\n## Training\n"  # the last section; a stage copies its base's and appends its own

# What loading a card raises if there is none or its metadata is broken.
NO_CARD = (OSError, ValueError, YAMLError, HfHubHTTPError, OfflineModeIsEnabled)

SETTINGS = (
    "batch_size", "num_negatives", "max_length", "chunk_tokens", "temperature", "in_batch_negatives",
    "false_negative_margin", "matryoshka_dims", "matryoshka_weights", "spread_out_weight", "batches_of_one_set",
    "teacher", "teacher_instruction", "alpha", "contrastive_weight", "kd_losses", "states_error", "layer_map",
    "teacher_temperature", "similarity_temperature", "embedding_distance", "learning_rate", "lr_scheduler_type",
    "warmup_steps", "weight_decay", "steps", "seed", "bf16", "dtype", "load_in_4bit", "load_in_8bit", "use_peft",
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "gradient_checkpointing",
    "gradient_accumulation_steps", "processes",
)  # fmt: skip


@dataclass
class TrainingRun:
    """What a card says about a run.

    Args:
        stage: name of the script.
        base: the checkpoint it started from: a local folder or a Hub name.
        sources: the data sets.
        kinds, instructions: one per source; the instruction is that of the source's first row.
        triplets: number of triplets per source.
        samples: number of triplets trained on per source, repetitions included.
        example: one triplet, for the usage section.
        settings: name -> value as text; a setting that changed at a resume lists all its values.
        history: the Trainer's log.
        tasks: the tasks measured during training.
        certificate: what this and earlier stages were trained on (`nvembed.train.certificate`).
        saved_step: step whose weights are saved; None: the last one.
        revision: of the base on the Hub.
    """

    stage: str
    base: str
    sources: Sequence[DatasetSource]
    kinds: Sequence[str]
    instructions: Sequence[str]
    triplets: Sequence[int]
    samples: Sequence[int]
    example: dict
    settings: dict[str, str]
    history: Sequence[dict]
    tasks: Sequence[AbsTask]
    certificate: dict | None = None
    saved_step: int | None = None
    revision: str | None = None


def describe_run(
    settings: Mapping[str, object],
    record: RunRecord,
    data_args: DataArguments,
    training_args: StageArguments,
    blend: Blend,
    state: TrainerState,
    tasks: Sequence[AbsTask] | None,
    certificate: dict | None = None,
) -> TrainingRun:
    """Gathers what `write_card` needs, after training; `state` is the Trainer's."""
    history = state.log_history
    steps = max((entry.get("step", 0) for entry in history), default=0)
    return TrainingRun(
        stage=training_args.stage,
        base=settings["model_name_or_path"],
        sources=data_args.datasets,
        kinds=[kind_of(source) for source in data_args.datasets],
        instructions=[table[0]["instruction"] for table in blend.tables],
        triplets=[len(table) for table in blend.tables],
        samples=blend.samples(steps * settings["batch_size"]),
        example=blend[0],
        settings=describe_settings({**settings, "steps": steps}, record),
        history=list(history),
        tasks=list(tasks or ()),
        certificate=certificate,
        saved_step=state.best_global_step if training_args.load_best_model_at_end else None,
        revision=settings["model_revision"],
    )


def describe_settings(settings: Mapping[str, object], record: RunRecord) -> dict[str, str]:
    """The settings that a card shows, as text; those that changed at a resume with each value and its first step."""
    described = {}
    recorded = record.periods[-1][1]
    changed = [name for name in recorded if len(record.history(name)) > 1 and name not in SETTINGS]
    for name in (*SETTINGS, *changed):
        (_, first), *later = record.history(name) if name in recorded else [(0, settings.get(name))]
        if any(is_shown(name, value) for value in (first, *(value for _, value in later))):
            texts = [_as_text(first), *(f"from step {step}: {_as_text(value)}" for step, value in later)]
            described[name] = "; ".join(texts)
    return described


def is_shown(name: str, value: object) -> bool:
    """Whether a setting says something: 0 does, and so does what is off where most have it on."""
    is_off = value is False and name not in ("use_peft", "in_batch_negatives")
    return not (value is None or is_off or value == NOT_RECORDED)


def _as_text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def write_card(folder: Path, run: TrainingRun, name: str, adapter: bool = False) -> None:
    """Writes README.md and the picture of the loss curve in it.

    Args:
        folder: of the checkpoint or of the adapter.
        name: Hub name or local folder that the usage section loads the model from.
        adapter: whether the folder holds only an adapter.
    """
    name = name.rstrip("/")
    before, earlier = earlier_training(run.base, run.revision, folder)
    heading, curve = run.stage, f"loss_{run.stage}.png"
    if count := earlier.count(f"\n### {run.stage}"):  # a stage on top of the same stage
        heading, curve = f"{run.stage} ({count + 1})", f"loss_{run.stage}_{count + 1}.png"
    has_curve = any("loss" in entry for entry in run.history)
    if has_curve:
        draw_curves(run.history, run.stage, folder / curve)
    base_model = run.base if is_hub_name(run.base) else before.get("base_model")
    percent = {name: 100 * score for name, score in last_scores(run).items()}
    data = ModelCardData(
        model_name=name.split("/")[-1],
        base_model=base_model,
        datasets=sorted({source.path for source in run.sources if is_hub_name(source.path)}) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="feature-extraction",
        **{name: before[name] for name in ("license", "license_name", "license_link") if name in before},
        tags=["nvembed", "sentence-transformers", "sentence-similarity", "mteb"],
        eval_results=eval_results(percent, {task.metadata.name: describe(task) for task in run.tasks}) or None,
    )
    text = f"# {name.split('/')[-1]}\n\n{introduction(run, base_model)}\n\n## Usage\n\n{usage(run, name, adapter)}\n"
    if percent:
        text += f"\n## Evaluation\n\n{evaluation_table(run)}\n"
    if run.certificate is not None:
        text += f"{TRAINING_DATA}\n{training_data_text(run.certificate)}\n"
    text += f"{TRAINING}{earlier}\n### {heading}\n\n{training_text(run)}\n"
    if has_curve:
        text += f"\n![Loss by step]({curve})\n"
    save_card(folder, data, text)


def write_base_card(folder: Path, base: str) -> None:
    """Writes the card of an untrained checkpoint, from which the cards of its stages take the base model."""
    data = ModelCardData(
        base_model=base if is_hub_name(base) else None,
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["nvembed"],
    )
    text = f"# Untrained NV-Embed checkpoint\n\nMade from `{Path(base).name if Path(base).exists() else base}` by "
    text += "`train/init_checkpoint.py` of nvembed. Its embeddings are the mean of the decoder's states; train it.\n"
    save_card(folder, data, text)


def continue_card(
    base: str, revision: str | None, folder: Path, name: str, heading: str, text: str, others: Sequence[str] = ()
) -> None:
    """Writes the base's card with one more step of its training section, and with the new checkpoint's name.

    The sets that it names are those of the new checkpoint's certificate, if `folder` has one.

    Args:
        base, revision: local folder or Hub name of the checkpoint that the step began with.
        name: Hub name or local folder of the new one.
        others: further checkpoints that it was made from, whose data sets are its own, too.
    """
    base, name = base.rstrip("/"), name.rstrip("/")
    card = find_card(base, revision) or ModelCard(f"---\ntags:\n- nvembed\n---\n\n# {name.split('/')[-1]}\n")
    before, _, _ = card.text.partition(TRAINING)
    _, earlier = earlier_training(base, revision, folder)
    before = renamed(before, card.data, base, name)
    # Its scores are those of the weights before this step.
    before = before.replace("\n## Evaluation\n", "\n## Evaluation before the last step below\n")
    certificate = read_training_data(str(folder))
    if certificate is not None:
        before = re.sub(rf"{TRAINING_DATA}.*?(?=\n## |\Z)", "\n", before, flags=re.DOTALL)
        before = f"{before.rstrip()}\n{TRAINING_DATA}\n{training_data_text(certificate)}"
    for other in others:
        if (own := find_card(other, None)) is not None:
            card.data.datasets = sorted({*(card.data.datasets or ()), *(own.data.datasets or ())}) or None
    card.data.eval_results = None
    card.data.model_name = name.split("/")[-1]
    save_card(folder, card.data, f"{before.strip()}\n{TRAINING}{earlier}\n### {heading}\n\n{text}\n")


def renamed(text: str, data: ModelCardData, base: str, name: str) -> str:
    """A card's text with another model's name in its heading and in the code that loads it.

    A card of ours may call its model by a name on the Hub or by another path than `base`; its code loads nothing else.
    """
    is_ours = "nvembed" in (data.tags or [])

    def load(match: re.Match) -> str:
        return f'{match[1]}("{name}"' if is_ours or match[2] == base else match[0]

    text = re.sub(r'(from_pretrained|SentenceTransformer)\("([^"]+)"', load, text)
    for old in (base.split("/")[-1], data.model_name):
        text = text.replace(f"# {old}\n", f"# {name.split('/')[-1]}\n", 1)
    return text


def write_exported_card(base: str, folder: Path, name: str, text: str) -> None:
    """Writes the card of a checkpoint for stock servers: `text`, and the base's license, training data and training."""
    base, name = base.rstrip("/"), name.rstrip("/")
    before, earlier = earlier_training(base, None, folder)
    certificate, title = read_training_data(base), name.split("/")[-1]
    data = ModelCardData(
        model_name=title,
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction",
        tags=["sentence-transformers", "sentence-similarity"],
        **{key: before[key] for key in ("base_model", "license", "license_name", "license_link") if key in before},
    )
    lines = ["from sentence_transformers import SentenceTransformer", "", f'model = SentenceTransformer("{name}")']
    code = "\n".join([*lines, f"queries = model.encode(texts, prompt={format_instruction('...')!r})"])
    content = f"# {title}\n\n{text}\n\n```python\n{code}\n```\n"
    if certificate is not None:
        content += f"{TRAINING_DATA}\n{training_data_text(certificate)}\n"
    save_card(folder, data, f"{content}{TRAINING}{earlier}" if earlier else content)


def save_card(folder: Path, data: ModelCardData, text: str) -> None:
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / CARD)


def is_hub_name(name: str) -> bool:
    if Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def find_card(base: str, revision: str | None) -> ModelCard | None:
    """The card of a local folder, or of a Hub repository at a revision; None if there is none that can be read."""
    try:
        return ModelCard.load(hf_hub_download(base, CARD, revision=revision) if is_hub_name(base) else Path(base, CARD))
    except NO_CARD as error:
        logger.info(f"no card of {base} to take anything from: {error}")
        return None


def earlier_training(base: str, revision: str | None, folder: Path) -> tuple[dict, str]:
    """Metadata of the base's card and, if the base is local, its training section, copying the loss curves in it."""
    card = find_card(base, revision)
    if card is None:
        return {}, ""
    if is_hub_name(base):
        return card.data.to_dict(), ""
    _, _, training = card.text.partition(TRAINING)
    for image in re.findall(r"!\[[^]]*]\((loss_\w+\.png)\)", training):
        if Path(base, image).is_file() and not (folder / image).exists():
            shutil.copyfile(Path(base, image), folder / image)
    return card.data.to_dict(), training.rstrip() + "\n" if training else ""


def introduction(run: TrainingRun, base_model: str | None) -> str:
    source = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"`{Path(run.base).name}`"
    return (
        f"A text-embedding model made from {source} as [NV-Embed](https://arxiv.org/abs/2405.17428) is: a decoder with "
        "bidirectional attention, pooled over its tokens, contrastively tuned on texts with instructions."
    )


def usage(run: TrainingRun, name: str, adapter: bool) -> str:
    """Code that runs as written, with one of the triplets as its example."""
    instruction = format_instruction(run.example["instruction"])
    on_passages = f", instruction={instruction!r}" if run.example["symmetric"] else ""
    passages = [shorten(text) for text in [run.example["positive"], *run.example["negatives"][:1]]]
    load = [f'model = AutoModel.from_pretrained("{name}", trust_remote_code=True)']
    if adapter:
        load = [
            f'base = AutoModel.from_pretrained("{run.base}", trust_remote_code=True)',
            f'model = PeftModel.from_pretrained(base, "{name}").eval()',
        ]
    lines = [
        "```python",
        *(["from peft import PeftModel"] if adapter else []),
        "from transformers import AutoModel",
        "",
        *load,
        f"queries = model.encode([{shorten(run.example['query'])!r}], instruction={instruction!r})",
        f"passages = model.encode({passages!r}{on_passages})",
        "print(queries @ passages.T)  # cosine similarities",
        "```",
    ]
    if not adapter:
        lines += ["", f'`SentenceTransformer("{name}", trust_remote_code=True)` gives the same embeddings.']
    return "\n".join(lines)


def shorten(text: str, words: int = 30) -> str:
    return " ".join(text.split()[:words])


def measurements(run: TrainingRun) -> list[dict]:
    """Log entries with scores, up to the step whose weights are saved."""
    names = [task.metadata.name for task in run.tasks]
    points = [entry for entry in run.history if names and all(f"eval_{name}" in entry for name in names)]
    return [entry for entry in points if run.saved_step is None or entry["step"] <= run.saved_step]


def last_scores(run: TrainingRun) -> dict[str, float]:
    """The last main score of each task, 0 to 1; empty if none was measured."""
    last = measurements(run)[-1:]
    return {task.metadata.name: entry[f"eval_{task.metadata.name}"] for entry in last for task in run.tasks}


def evaluation_table(run: TrainingRun) -> str:
    points = measurements(run)
    shown = points if len(points) <= 4 else [*points[:3], points[-1]]
    rows = [["task", "metric", "training data", *(f"step {entry['step']}" for entry in shown)]]
    for task in run.tasks:
        name = task.metadata.name
        scores = [f"{100 * entry[f'eval_{name}']:.2f}" for entry in shown]
        seen = mark(is_seen(task, run.certificate))
        rows.append([name, task.metadata.main_score.replace("_", " "), seen, *scores])
    text = "Held-out tasks by mteb's classes, in percent, measured during training. Seen: training data of the same "
    return f"{text}set was trained on; zero-shot: none was.\n\n" + markdown_table(rows, 3)


def training_data_text(certificate: dict) -> str:
    """The sets of all stages as mteb names them, for the leaderboard's entry of the model."""
    names = sorted(training_datasets(certificate))
    listed = "".join(f'    "{name}",\n' for name in names)
    partial = "" if certificate.get("complete") else " What its base was trained on is not known."
    code = f"training_datasets = {{\n{listed}}}" if names else "training_datasets = set()"
    return (
        f"[`{FILE}`]({FILE}) says for every stage which sets were trained on, with digests of their files, and what "
        "was dropped from them for being too close to test sets. The tasks of mteb whose training data is in it, as "
        f"`mteb.ModelMeta` takes them.{partial}\n\n```python\n{code}\n```"
    )


def training_text(run: TrainingRun) -> str:
    rows = [["data set", "kind", "instruction", "triplets", "trained on"]]
    columns = (run.sources, run.kinds, run.instructions, run.triplets, run.samples)
    for source, kind, instruction, triplets, samples in zip(*columns, strict=True):
        place = source.path if is_hub_name(source.path) else source.name
        rows.append([place, kind, instruction or "-", f"{triplets:,}", f"{samples:,}"])
    settings = [["setting", "value"]]
    settings += [[f"`{name}`", value] for name, value in run.settings.items()]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    start = run.base if is_hub_name(run.base) else Path(run.base).name
    text = f"`train/{run.stage}.py` of nvembed, started from `{start}`; {libraries}"
    seconds = sum(entry["train_runtime"] for entry in run.history if "train_runtime" in entry)
    text += f"; {seconds / 60:.1f} minutes since the last start" if seconds else ""
    memory = max((entry["peak_memory_gb"] for entry in run.history if "peak_memory_gb" in entry), default=0)
    text += f"; at most {memory:.1f} GB of memory a process, of its GPU if it had one.\n\n" if memory else ".\n\n"
    spread = spread_text(run.history)
    spread = f"\n\n{spread}" if spread else ""
    return f"{text}{markdown_table(rows, 3)}\n\n{markdown_table(settings, 2)}{spread}"


def spread_text(history: Sequence[dict]) -> str:
    """How much the embeddings crowd, at the first log of training and at the last; "" of earlier versions' logs."""
    logs = [entry for entry in history if "mean_cosine" in entry and "effective_rank" in entry]
    if not logs:
        return ""
    first, last = logs[0], logs[-1]
    return (
        f"Mean cosine of a batch's unrelated queries: {first['mean_cosine']:.2f} at step {first['step']}, "
        f"{last['mean_cosine']:.2f} at step {last['step']}; effective rank of texts of the steps before "
        f"{first['effective_rank']:.0f}, then {last['effective_rank']:.0f}."
    )


def draw_curves(history: Sequence[dict], title: str, path: Path) -> None:
    """Loss and, where the log has them, how the embeddings crowd, over the steps."""
    shown = {"loss": "loss", "mean_cosine": "mean cosine of unrelated queries", "effective_rank": "effective rank"}
    points = {key: [(entry["step"], entry[key]) for entry in history if key in entry] for key in shown}
    curves = {label: points[key] for key, label in shown.items() if points[key]}
    figure = Figure(figsize=(6, 2.2 * len(curves) + 0.6), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(len(curves), 1, squeeze=False)[:, 0], curves.items()):
        axes.plot(*zip(*points), marker="o" if len(points) < 20 else None, markersize=3, linewidth=1.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(name, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
