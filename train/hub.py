"""Pushes what was trained to the Hub, after checking before training that the push will work."""

from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from nvembed.eval.files import LOCK
from nvembed.eval.log_history import LOG_FILE
from nvembed.train.adapter import ADAPTER
from nvembed.train.arguments import ModelArguments, StageArguments
from nvembed.train.guard import BAD_BATCH


# Subfolders, the log, the texts of a batch that stopped a run, and what keeps other runs out of the folder.
PRIVATE = ["*/*", LOG_FILE, BAD_BATCH.format("*"), LOCK]
CONFIG_FILES = {"model": "config.json", "adapter": "adapter_config.json"}
WEIGHTS = {  # as patterns, whose * would reach into folders
    "model": ["model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"],
    "adapter": ["adapter_model.safetensors", "adapter_model.bin"],
}


def check_push(training_args: StageArguments, model_args: ModelArguments) -> dict[str, str]:
    """Checks the token, creates the repositories and checks write access to them, before training.

    Returns:
        The full names of the repositories for the "model" and the "adapter", whichever were requested. Pushed together,
        the adapter gets its own repository. Processes other than the main one get an empty dictionary.

    Raises:
        ConnectionError: the Hub does not respond.
        PermissionError: the token may not write to the repository.
        ValueError: there is no token, the Hub rejects it, there is no adapter to push, or an adapter would come to lie
            beside a whole model.
    """
    if training_args.push_adapter and not model_args.use_peft:
        raise ValueError("--push_adapter has no adapter to push: --use_peft is false; push the model: --push_to_hub")
    if training_args.process_index > 0 or not (training_args.push_to_hub or training_args.push_adapter):
        return {}
    api = HfApi(token=training_args.hub_token)
    try:
        user = api.whoami()["name"]
    except LocalTokenNotFoundError:
        raise ValueError(
            "pushing needs a Hub token: run `hf auth login`, or set HF_TOKEN or --hub_token, or leave --push_to_hub "
            "and --push_adapter out"
        ) from None
    except (httpx.TransportError, OfflineModeIsEnabled) as error:
        raise ConnectionError(f"{api.endpoint} does not answer ({error}); train without --push_to_hub") from error
    except HfHubHTTPError as error:
        raise ValueError(f"{api.endpoint} does not accept the token: {error}; run `hf auth login` again") from error
    name = training_args.hub_model_id or Path(training_args.output_dir).absolute().name
    name = name if "/" in name else f"{user}/{name}"
    repositories = {}
    if training_args.push_to_hub:
        repositories["model"] = name
    if training_args.push_adapter:
        repositories["adapter"] = f"{name}-adapter" if repositories else name
    for kind, repo_id in repositories.items():
        try:
            api.create_repo(repo_id, private=training_args.hub_private_repo, exist_ok=True)
            api.auth_check(repo_id, write=True)
            files = api.list_repo_files(repo_id)
        except HfHubHTTPError as error:
            raise PermissionError(
                f"the token of {user} may not write to {repo_id}: {error}; use a token with write access, or name a "
                "repository of your own with --hub_model_id"
            ) from error
        other, named = {"model": ("adapter", "an adapter"), "adapter": ("model", "a whole model")}[kind]
        if CONFIG_FILES[other] in files:
            raise ValueError(
                f"{repo_id} already holds {named} ({CONFIG_FILES[other]}); a repository cannot hold both, because "
                "loaders could not tell which is meant: name another with --hub_model_id, or delete that file there"
            )
    return repositories


def push(repositories: dict[str, str], training_args: StageArguments) -> list[str]:
    """Uploads what was trained to the repositories of `check_push` and returns their addresses.

    Raises:
        ConnectionError: as `push_folder`.
    """
    folders = {"model": Path(training_args.output_dir), "adapter": Path(training_args.output_dir, ADAPTER)}
    return [push_folder(folders[kind], repo_id, kind, training_args) for kind, repo_id in repositories.items()]


def push_folder(folder: Path, repo_id: str, kind: str, training_args: StageArguments) -> str:
    """Uploads the files of a folder, without its subfolders, in one commit, and returns the repository's address.

    Weights of an earlier push go in the same commit: sharded otherwise, they could be loaded in place of the new ones.

    Raises:
        ConnectionError: the upload failed; the folder is unchanged.
    """
    api = HfApi(token=training_args.hub_token)
    try:
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            ignore_patterns=PRIVATE,
            delete_patterns=WEIGHTS[kind],
            commit_message=f"{training_args.stage} done",
        )
    except (httpx.HTTPError, OSError, ValueError) as error:
        excluded = " ".join(f'"{pattern}"' for pattern in PRIVATE)
        replaced = " ".join(f'--delete "{pattern}"' for pattern in WEIGHTS[kind])
        raise ConnectionError(
            f"{folder} is whole but was not pushed: {error}. Push it: "
            f"`hf upload {repo_id} {folder} --exclude {excluded} {replaced}`"
        ) from error
    return f"{api.endpoint}/{repo_id}"
