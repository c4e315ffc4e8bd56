"""Publishes a student's folder on the Hub, in one commit.

python -m hf_kd.deploy.hub runs/sst2-student my-name/sst2-student [--private] [--revision BRANCH]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, run_as_future
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .. import __version__
from ..checkpoint import has_tokenizer, load_finetuned
from . import FP32_FILE
from .classifier import OnnxTextClassifier
from .model_card import card_problems_warn, write_model_card
from .parity import ParityError, check_parity


logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
# What is published; everything else in the folder stays where it is.
_PUBLISHED = re.compile(
    "|".join(
        (
            r"(config|generation_config|preprocessor_config)\.json",
            r"model(-\d+-of-\d+)?\.safetensors",
            r"model\.safetensors\.index\.json",
            r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json",
            r"(vocab|merges)\.txt|bpe\.codes",
            r"(spiece|spm|sentencepiece\.bpe|tokenizer)\.model",
            r"onnx/[^/]+\.onnx",
            r"onnx/export_report\.json",
            r"README\.md|results\.json|report\.md|pareto\.png",
        )
    )
)
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{20,}")
_BINARY = (".safetensors", ".onnx", ".png", ".model")
# For a look at whether the ONNX file is this model's.
_TEXTS = ("Yes.", "It rained all day, so we stayed in and read.")


def push_student(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """
    Publish a student with its tokenizer, ONNX files, card and results, in one commit. The card is written anew, unless
    a person has edited it.

    Of the folder only files that belong to a student are sent: never optimizer states, projections, checkpoints,
    predictions or training arguments. Files of these names that an earlier push left in the repository, and that the
    folder does not hold any more, are deleted in the same commit (but for the card); whatever else is there stays.

    An interrupted push leaves the repository as it was (at most new and empty). Push again: what has been uploaded is
    not sent twice, and what is there already makes no second commit.

    Args:
        folder (`str` or `Path`): A student's output folder.
        repo_id (`str`): `name`, or `owner/name`; made if it is not there.
        private (`bool`, *optional*): Who may see a new repository; by default what its owner has set. `True` is an
            error for one that is public already.
        token (`str`, *optional*): A token that may write. By default that of HF_TOKEN, or of `hf auth login`.
        revision (`str`, *optional*): The branch, made from `main` if it is not there. Defaults to `main`.
        commit_message (`str`, *optional*): By default says which version of hf_kd it was.

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit.

    Raises:
        ValueError: If the folder is not a complete student, its ONNX file is another model's, or a file holds an
            access token. Nothing is sent then.
        PermissionError: If the token may not write there.
    """
    folder = Path(folder)
    check_student(folder)
    _check_no_tokens(folder, published_files(folder))
    try:
        repo_id = open_repository(repo_id, private=private, token=token)
        with card_problems_warn():
            write_model_card(folder, repo_id=repo_id)
        return _commit_files(
            folder,
            repo_id,
            token=token,
            revision=revision,
            commit_message=commit_message or f"Student distilled with hf_kd {__version__}",
        )
    except (PermissionError, ValueError):
        raise  # says what to do
    except Exception:
        logger.error(
            f"the push to {repo_id} did not finish. The repository is as it was, or complete if only the answer got "
            "lost. Push again, what has been uploaded is not sent twice: "
            f"python -m hf_kd.deploy.hub {folder} {repo_id}"
        )
        raise


def push_files(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """
    Publish a folder as it is: the files that [`push_student`] would send, unchecked, with the card that is there.

    Args, returns and raises: As [`push_student`].
    """
    repo_id = open_repository(repo_id, private=private, token=token)
    return _commit_files(Path(folder), repo_id, token=token, revision=revision, commit_message=commit_message)


def check_student(folder: str | os.PathLike) -> None:
    """Raise a `ValueError` unless a folder holds a model that loads whole, a tokenizer, and no other's ONNX files."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{str(folder)!r} holds no config.json; give the output folder of a run, or save the student there with "
            "trainer.save_model(folder)."
        )
    if (folder / "model.safetensors").is_file() and (folder / "model.safetensors.index.json").is_file():
        raise ValueError(
            f"{str(folder)!r} holds the weights both as model.safetensors and in parts; delete those that are not "
            "this student's."
        )
    if not has_tokenizer(folder):
        raise ValueError(
            f"{str(folder)!r} holds no tokenizer, without which nobody can use the student; save it there with "
            "tokenizer.save_pretrained(folder)."
        )
    model = load_finetuned(folder, argument="folder", dtype=torch.float32, exact=True).eval()
    if (folder / FP32_FILE).is_file():
        _check_onnx(folder, model)


def _check_onnx(folder: Path, model: PreTrainedModel) -> None:
    """A student that was trained again lies beside the ONNX files of the one before."""
    try:
        check_parity(
            model,
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
            OnnxTextClassifier.from_pretrained(folder, FP32_FILE),
            _TEXTS,
        )
    except ImportError as error:
        logger.warning(f"{FP32_FILE} is published without a look at whether it is this student's: {error}")
    except ParityError as error:
        raise ValueError(
            f"{folder / FP32_FILE} does not answer as the student does, so it is another one's; export it anew "
            f"(recipes/export_onnx.py), or delete {folder / 'onnx'}. {error}"
        ) from error


def published_files(folder: str | os.PathLike) -> list[str]:
    """Names of the files of a folder that a push sends."""
    folder = Path(folder)
    names = (path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("onnx/*")))
    return sorted(name for name in names if _PUBLISHED.fullmatch(name) and (folder / name).is_file())


def open_repository(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """
    Make a repository if it is not there.

    Returns:
        `str`: Its full name, with the owner.

    Raises:
        PermissionError: If the token may not write there.
        ValueError: If it should be private, and is public.
    """
    api = _api(token)
    with _refusals_explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # The client takes a refusal for somebody else's repository, which can be read, as "it is there".
        user = api.whoami()
    if repo_id.split("/")[0] not in (user["name"], *(organization["name"] for organization in user.get("orgs", []))):
        raise PermissionError(_not_writable(repo_id, f"it is not {user['name']}'s, nor of an organisation of theirs."))
    if private and not api.model_info(repo_id).private:
        raise ValueError(
            f"{repo_id} is there already and public, so what is pushed would be; make it private in its settings, or "
            "give another name."
        )
    return repo_id


def push_in_background(folder: str | os.PathLike, repo_id: str, **options: Any) -> Future:
    """
    Push what a folder holds now, unchecked, while the caller goes on; training may change or delete the folder.

    Args:
        folder (`str` or `Path`): A checkpoint that was saved just now, or a student that was checked.
        repo_id (`str`): The repository, with its owner.
        options: `token`, `revision` and `commit_message` of [`push_student`].

    Returns:
        `concurrent.futures.Future`: Of the commit. A failure is logged too, since nobody may ask for it.
    """
    copy = tempfile.mkdtemp(prefix="hf_kd-push-")
    for name in published_files(folder):
        target = Path(copy, name)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(folder, name), target)

    def finish(job: Future) -> None:
        shutil.rmtree(copy, ignore_errors=True)
        if (error := job.exception()) is not None:
            logger.warning(f"{options.get('commit_message', 'a push')!r} did not get to {repo_id}: {error}")

    job = run_as_future(push_files, copy, repo_id, **options)
    job.add_done_callback(finish)
    return job


def _commit_files(
    folder: Path, repo_id: str, *, token: str | bool | None, revision: str | None, commit_message: str | None
) -> CommitInfo:
    names, api = published_files(folder), _api(token)
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(f"{str(folder)!r} holds no safetensors, and without weights it is no model; save it there.")
    _check_no_tokens(folder, names)
    try:
        remote = api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=str(revision))
        remote = api.model_info(repo_id, revision=revision)
    stale = {sibling.rfilename for sibling in remote.siblings or ()} - {*names, CARD_FILE}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, folder / name) for name in names),
        *(CommitOperationDelete(name) for name in sorted(stale) if _PUBLISHED.fullmatch(name)),
    ]
    with _refusals_explained(repo_id):
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload with hf_kd",
            revision=revision,
            # Somebody else's commit since then is an error: together they may be no complete model.
            parent_commit=remote.sha,
        )


@contextlib.contextmanager
def _refusals_explained(repo_id: str) -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) not in (401, 403):
            raise
        raise PermissionError(_not_writable(repo_id, str(error))) from error


def _not_writable(repo_id: str, reason: str) -> str:
    return (
        f"nothing can be written to {repo_id!r} on the Hub: {reason} Log in with a token that may write (`hf auth "
        "login`, or HF_TOKEN), and give a name of your own as `name` or `owner/name`."
    )


def _check_no_tokens(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if not name.endswith(_BINARY) and _TOKEN.search((folder / name).read_bytes()):
            raise ValueError(
                f"{folder / name} holds an access token of the Hub (hf_...), and would be published; take it out, and "
                "revoke it at https://huggingface.co/settings/tokens if others have seen the file."
            )


def _api(token: str | bool | None) -> HfApi:
    return HfApi(token=token, library_name="hf_kd", library_version=__version__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the output folder of a run")
    parser.add_argument("repo_id", help="name, or owner/name, on the Hub; made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="only you and your organisation see it")
    parser.add_argument("--revision", help="the branch; by default main")
    args = parser.parse_args()
    commit = push_student(args.folder, args.repo_id, private=args.private, revision=args.revision)
    sys.stdout.write(f"{commit.commit_url}\n")


if __name__ == "__main__":
    main()
