"""Pushing what `export` wrote to the Hugging Face hub: one commit, into a private repository unless asked otherwise.

Paths of this machine stay on it: the base model is named as the hub knows it, and files of data by their names. The
token is the one that `hf auth login` or `HF_TOKEN` has set; it is read by the hub's own library and written nowhere.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from weightlora.errors import ConfigError, short

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_hub_id(name: Any) -> bool:
    """Whether a name is one of the hub's, and of no folder or file here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(name, str) or not _ID.fullmatch(name) or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return Path(name).suffix not in {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gguf", ".txt"}


def check(repo: str, base: Any) -> str | None:
    """The base model as the hub knows it, once it is clear that pushing can work; before anything is written.

    Args:
        base: what the run or the caller says the base model is; None for a model without one.

    Raises:
        ConfigError: no name for a repository, nobody is logged in, offline, or the base model is a folder here.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise ConfigError(f"{short(repo)} is no name of a repository; give it as user/name.") from None
    if constants.is_offline_mode():
        raise ConfigError(f"cannot push to {repo}: HF_HUB_OFFLINE is set; unset it, or export without pushing.")
    if get_token() is None:
        raise ConfigError(f"cannot push to {repo}: nobody is logged in; run `hf auth login`, or set HF_TOKEN.")
    if base is not None and not is_hub_id(base):
        raise ConfigError(
            f"cannot push to {repo}: the base model is {short(str(base))}, which is on this machine only; say which "
            "one on the hub it is (`--hub-base user/model`)."
        )
    return base


def push(folder: Path, repo: str, card: str, *, base: str | None, private: bool = True) -> str:
    """Upload an exported folder, with this card and base model; returns the address of the commit.

    An existing repository stays as public or private as it is.

    Raises:
        ConfigError: the hub refuses or cannot be reached; `folder` stays, and nothing was committed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    contents: dict[str, Any] = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    contents["README.md"] = card.encode()
    if (config := contents.get("adapter_config.json")) is not None:
        values = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
        contents["adapter_config.json"] = (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
    contents.pop("Modelfile", None)  # which names the base model's file on this machine
    operations = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
    try:
        api = HfApi(library_name="weightlora")
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        return str(api.create_commit(repo, operations, commit_message="Upload by weightlora").commit_url)
    except (HfHubHTTPError, ConnectionError, OSError) as error:
        why = " ".join(str(getattr(error, "server_message", None) or error).split())
        raise ConfigError(
            f"{folder} is written, but {repo} was not pushed to: {why[:300] or type(error).__name__}"
        ) from None
