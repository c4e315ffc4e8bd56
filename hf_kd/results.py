"""What a run measured, as `results.json` and as a table."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .cpu import cpu_facts
from .files import write_whole


ROLES = {
    "teacher": "teacher",
    "baseline": "student without distillation",
    "student": "student distilled",
    "int8": "student distilled + int8",
}
# What a guess scores, in points of 100, where dev rows contradict the training rows and models end below it.
CHANCE = {"wnli": 50.0}
# /home/me/data, ~/data, ../data, also behind file: or in a list; not the / of org/model.
_PATH_OUTSIDE = re.compile(r"(?<![\w./:~-])(?:~\w*|\.\.)?/[^,;'\"\n]*|(?<=file:)//[^,;'\"\n]*")
_PACKAGES = (
    *("hf-kd", "torch", "transformers", "accelerate", "datasets", "evaluate", "tokenizers"),
    *("optimum-onnx", "onnx", "onnxscript", "onnxruntime"),
)


def write_results(path: str | os.PathLike, rows: Sequence[dict[str, Any]], **sections: Any) -> None:
    """Write rows beside what they were measured with; complete or not at all.

    Args:
        path (`str`): The file to write.
        rows (sequence of `dict`):
            One per model: `role` ("teacher", "baseline", "student", or "int8", the quantised student), `task`,
            `seed`, `metrics` (split to metric to value), `main_metric` (split and metric), `parameters`, and what else
            identifies the model.
        sections: What else belongs to the run, by name: `export` of [`~hf_kd.deploy.onnx.export_onnx`], `benchmark` of
            [`~hf_kd.deploy.benchmark.benchmark`], `comparisons` of
            [`~hf_kd.significance.paired_bootstrap`] with `task`, `split` and `seeds`. An earlier `run` stays if it is
            given.
    """
    results = {"run": describe_run(), "rows": list(rows), **sections}
    write_whole(path, json.dumps(results, indent=2) + "\n")


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """Read what [`write_results`] wrote."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def describe_run() -> dict[str, Any]:
    """Command, versions, hardware, threads and commit, without paths or tokens of the user's machine."""
    return {
        "command": describe_command(sys.argv),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": _hardware(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads_per_process": torch.get_num_threads(),
        "commit": _commit(),
    }


def format_table(rows: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]] = ()) -> str:
    """One Markdown line per task and role: main metric as mean ± sample standard deviation over seeds, parameters,
    share retained of a teacher that is not below chance.

    Args:
        rows (sequence of `dict`): Rows of one or more results files.
        comparisons (sequence of `dict`, *optional*):
            Their section `comparisons`; with any there is a column for the distilled student's difference to the one
            without distillation, in points, and its interval.
    """
    difference_of = {found["task"]: _format_difference(found) for found in comparisons}
    names = ["task", "model", "metric", "seeds", "value"]
    names += [f"difference [{100 * comparisons[0]['confidence']:g} %]"] if difference_of else []
    names += ["parameters", "retained", "labelled rows", "unlabelled rows", "steps"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for task in dict.fromkeys(row["task"] for row in rows):
        teacher = main_values(rows, task, "teacher")
        has_share = any(teacher) and not is_below_chance(rows, task)
        for role, name in ROLES.items():
            values = main_values(rows, task, role)
            if not values:
                continue
            row = next(row for row in rows if (row["task"], row["role"]) == (task, role))
            value = f"{statistics.mean(values):.2f}" + (
                f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            )
            kept = f"{statistics.mean(values) / statistics.mean(teacher):.1%}" if has_share else ""
            difference = f"{difference_of.get(task, '') if role == 'student' else ''} | " if difference_of else ""
            lines.append(
                f"| {task} | {name} | {row['main_metric']['name']} | {len(values)} | {value} | {difference}"
                f"{row['parameters'] / 1e6:.1f}M | {kept} "
                f"| {row.get('labeled_rows', '')} | {row.get('unlabeled_rows', '')} | {row.get('steps', '')} |"
            )
    return "\n".join(lines)


def _format_difference(comparison: dict[str, Any]) -> str:
    points, low, high = (100 * comparison[name] for name in ("difference", "low", "high"))
    return f"{points:+.2f} [{low:+.2f}, {high:+.2f}]"


def main_values(rows: Sequence[dict[str, Any]], task: str, role: str) -> list[float]:
    """Main metric in points of 100, once per seed, or once per teacher of several."""
    by_seed = {(row["seed"], row.get("teacher")): row for row in rows if (row["task"], row["role"]) == (task, role)}
    return [100 * row["metrics"][row["main_metric"]["split"]][row["main_metric"]["name"]] for row in by_seed.values()]


def is_below_chance(rows: Sequence[dict[str, Any]], task: str) -> bool:
    """Whether the teacher, or the mean of several, is worse than a guess: a share of it says nothing."""
    teacher = main_values(rows, task, "teacher")
    return task in CHANCE and bool(teacher) and statistics.mean(teacher) < CHANCE[task]


def describe_command(argv: Sequence[str]) -> str:
    """The command line of a script and its arguments, tokens left out, and paths that lead out of the working folder
    shortened to their last part."""
    script = Path(argv[0])
    script = Path("recipes", script.name) if script.parent.name == "recipes" else Path(script.name)
    words: list[str] = []
    for before, word in zip(argv, argv[1:], strict=False):
        flag, equals, value = word.rpartition("=")
        if (flag or before).endswith("_token"):
            value = "hf_xxxxxxxx"  # whatever it looks like; the stars would be quoted
        shortened = _PATH_OUTSIDE.sub(lambda match: Path(match[0]).name, value)
        words.append(flag + equals + (Path(value).name if os.path.isabs(value) else shortened))
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", shlex.join(["python", str(script), *words]))


def _versions() -> dict[str, str]:
    """Of the packages that are installed."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} x {cpu_facts()['model']}"


def _commit() -> str | None:
    """Commit of the checkout this file is in, `+` for local changes; `None` for an installed package."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
