"""Where a checkpoint comes from: its name, its commit on the Hub, and what its card says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging


logger = logging.get_logger(__name__)


def identify(config: Any) -> dict[str, Any]:
    """
    The name of the checkpoint that a config came with, and what that checkpoint's card says.

    Returns:
        `dict`: `name` (a Hub id, or a folder's last part), for a Hub id `is_hub_id` and `revision` (the commit), and
        of the card's metadata `license`, `license_name`, `license_link`, `language` and `base_model`. Where it is not
        clear which commit was loaded, nothing is said of it or its card. Empty for a model that was made from a
        config.
    """
    path = getattr(config, "_name_or_path", None)
    if not path:
        return {}
    commits = _commits_of(config, path)
    if os.path.isdir(path) or not commits:
        return {"name": os.path.basename(os.path.abspath(path)), **_read_card(Path(path, "README.md"))}
    found = {"name": path, "is_hub_id": True}
    if len(commits) > 1:
        return found
    (revision,) = commits
    found["revision"] = revision
    try:
        card = hf_hub_download(path, "README.md", revision=revision)
    except (OSError, ValueError, HfHubHTTPError) as error:  # not there, or nobody to ask
        logger.info(f"nothing is known of the card of {path}: {error}")
        return found
    return {**found, **_read_card(Path(card))}


def _commits_of(config: Any, repo_id: str) -> list[str]:
    """The commits that a repository's model may have been loaded from; none if it is no repository.

    transformers 5 does not say which it was. The one in the cache is taken for it if it is the one of `main` there.
    """
    commit = getattr(config, "_commit_hash", None)  # transformers 4.57
    if commit is not None:
        return [commit]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id):
        return []
    repository = Path(constants.HF_HUB_CACHE, "models--" + repo_id.replace("/", "--"))
    snapshots, main = repository / "snapshots", repository / "refs" / "main"
    commits = {path.name for path in snapshots.iterdir()} if snapshots.is_dir() else set()
    if commits and main.is_file():
        commits.add(main.read_text(encoding="utf-8").strip())
    elif commits:
        commits.add("main")  # a revision was asked for, and the one of `main` is not there
    return sorted(commits)


def _read_card(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # a YAML block can be broken in many ways, and it is somebody else's
        logger.info(f"the card of {path.parent.name} cannot be read: {error}")
        return {}
    names = ("license", "license_name", "license_link", "language", "base_model")
    return {name: data[name] for name in names if isinstance(data.get(name), str | list)}
