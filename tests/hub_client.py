"""Runs functions in a process whose huggingface_hub talks to a `HubServer`.

The address of the Hub, offline mode and the cache are read when huggingface_hub is imported, so a client needs a
process of its own; one for all tests of a module, as importing takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


class ClientError(Exception):
    """What was raised in the client's process."""

    def __init__(self, kind: str, message: str, trace: str):
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.trace = kind, message, trace


class HubClient:
    """Calls functions of importable modules in the client's process: `client(function, *args, login=..., **kwargs)`.

    Args:
        endpoint (`str`): The server's address.
        home (`Path`): An empty folder for its cache.
    """

    def __init__(self, endpoint: str, home: Path):
        environment = {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets would tell another server
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        before = {name: os.environ.get(name) for name in (*environment, "HF_TOKEN")}
        os.environ.pop("HF_TOKEN", None)
        os.environ.update(environment)
        try:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_start)
            self(os.getpid)  # the process starts here
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def __enter__(self) -> HubClient:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.pool.submit(os._exit, 0)  # an orderly end takes as long as the start
        self.pool.shutdown()

    def __call__(self, function: Callable, *args: Any, login: str | None = None, **kwargs: Any) -> Any:
        """What the function returns, with the token `login` as HF_TOKEN.

        Raises:
            ClientError: If it raises.
        """
        result, error = self.pool.submit(_call, function, args, kwargs, login).result(timeout=300)
        if error is not None:
            raise ClientError(*error)
        return result


def _start() -> None:
    import huggingface_hub.constants  # noqa: F401  (reads the environment before conftest.py changes it)

    time.sleep = lambda seconds: None  # the client waits between its attempts


def _call(function: Callable, args: tuple, kwargs: dict[str, Any], login: str | None) -> tuple[Any, Any]:
    os.environ.pop("HF_TOKEN", None)
    if login is not None:
        os.environ["HF_TOKEN"] = login
    try:
        return function(*args, **kwargs), None
    except Exception as error:  # whose own kind may not survive the way to the other process
        return None, (type(error).__name__, str(error), traceback.format_exc())


# What the tests run in the client's process: plain values in, plain values out


def push(folder: str, repo_id: str, **kwargs: Any) -> str:
    """The commit's id."""
    from hf_kd.deploy.hub import push_student

    return push_student(folder, repo_id, **kwargs).oid


def look_around(repo_id: str) -> dict[str, Any]:
    """What the client is told of a repository."""
    from huggingface_hub import HfApi

    api = HfApi()
    (weights,) = api.get_paths_info(repo_id, ["model.safetensors"])
    return {
        "name": api.whoami()["name"],
        "branches": {branch.name: branch.target_commit for branch in api.list_repo_refs(repo_id).branches},
        "files": sorted(api.list_repo_files(repo_id)),
        "tree": sorted(entry.path for entry in api.list_repo_tree(repo_id)),
        "weights": {"size": weights.size, "sha256": weights.lfs.sha256},
    }


def download(repo_id: str, filename: str, **kwargs: Any) -> str:
    """Where the file is."""
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repo_id, filename, **kwargs)


def push_rows(rows: Any, repo_id: str, **kwargs: Any) -> str:
    """The commit's id."""
    return rows.push_to_hub(repo_id, **kwargs).oid


def load_rows(repo_id: str, **kwargs: Any) -> Any:
    """The training rows of a dataset."""
    import datasets

    datasets.config.USE_PARQUET_EXPORT = False  # it would ask a service of the Hub on another server
    return datasets.load_dataset(repo_id, split="train", **kwargs)


def torch_logits(name: str, texts: list[str], **kwargs: Any) -> list[list[float]]:
    """What transformers answers, tokenizer included."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    model = AutoModelForSequenceClassification.from_pretrained(name, **kwargs).eval()
    with torch.inference_mode():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.tolist()


def onnx_scores(name: str, texts: list[str], **kwargs: Any) -> list[dict[str, Any]]:
    """What `OnnxTextClassifier` answers."""
    from hf_kd.deploy import OnnxTextClassifier

    return OnnxTextClassifier.from_pretrained(name, **kwargs)(texts)


def load_layers(name: str, **kwargs: Any) -> int:
    """Number of layers of a teacher."""
    from hf_kd import load_teacher

    return load_teacher(name, **kwargs).config.num_hidden_layers


def export(name: str, output_dir: str, **kwargs: Any) -> None:
    """`export_onnx`."""
    from hf_kd.deploy import export_onnx

    export_onnx(name, output_dir, **kwargs)


def run_main(module: str, *argv: str) -> str:
    """What a script's main() prints."""
    import contextlib
    import importlib
    import io
    import sys

    before, sys.argv = sys.argv, [f"{module}.py", *argv]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            importlib.import_module(module).main()
    finally:
        sys.argv = before
    return printed.getvalue()


def train(teacher: str, student: str, output_dir: str, push_to_hub: bool = False, **arguments: Any) -> list[float]:
    """The logits of a student, both as names, after four steps."""
    from conftest import make_dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    from hf_kd import DistillationTrainer, DistillationTrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(student)
    settings = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3}
    args = DistillationTrainingArguments(
        output_dir=output_dir,
        **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 8},
        **{"push_to_hub": push_to_hub, **settings, **arguments},
    )
    trainer = DistillationTrainer(
        AutoModelForSequenceClassification.from_pretrained(student),
        args,
        teacher_model=teacher,
        train_dataset=make_dataset(24),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    if push_to_hub:
        trainer.push_to_hub()
    return [x for p in trainer.model.parameters() for x in p.detach().flatten().tolist()][:1000]
