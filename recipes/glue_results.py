"""Rebuild the results of the README: a teacher, students with and without distillation, and int8, on every task.

python recipes/glue_results.py [--tasks sst2 mrpc] [--seeds 1 2 3] [--glue_dir glue_data] [--work_dir runs/results]

For each task: fine-tune a teacher; for each seed distil it with the task's configuration, train the same student
without it, export the student to int8 and measure it. Then a paired bootstrap over the dev rows, one results file, its
plot, and the model cards of the first seed's students with their pictures. Every step is a recipe, printed and run as
you would run it; what is complete is not run again, so that a call that was stopped goes on with another.

Other flags belong to the recipes, by their names: those about data to all of them (`--max_seq_length 64`), those of
export_onnx.py to the measured export (`--benchmark_rounds 4`), those of `TrainingArguments` to all trainings
(`--max_steps 4`), and the rest to glue_distill.py (`--temperature 4`).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import io
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from export_onnx import ExportArguments
from glue_distill import check_export_is_installed
from glue_setup import DataArguments
from results_table import format_inference, plot
from transformers import TrainingArguments

from hf_kd.deploy.model_card import card_problems_warn, write_model_card
from hf_kd.deploy.report import require_matplotlib
from hf_kd.files import whole_file, write_whole
from hf_kd.glue import GLUE_TASKS, TextTask
from hf_kd.results import describe_command, format_table, read_results, write_results
from hf_kd.significance import paired_bootstrap


RECIPES = Path(__file__).parent
# Own data, as a user has them: two files with a text and a label.
EMOTION = TextTask("emotion", ("text",), (), ("accuracy", "f1_macro"), "accuracy")
TEACHER_EPOCHS = {"sst2": 2, "mrpc": 4, "rte": 5, "stsb": 4, "wnli": 3, "emotion": 3}
TEACHER_LEARNING_RATE = "1e-4"
# The metric of every seed is measured, the latency of the first.
QUICK = ("--benchmark_rounds", "1", "--benchmark_seconds", "0.01", "--benchmark_lengths", "16")
QUICK += ("--benchmark_threads", "1")


def main() -> None:
    args, flags = parse_flags()
    if not args.only_aggregate:
        check_export_is_installed()
        require_matplotlib()
        for task in args.tasks:
            make_runs(task, args, flags)
    found = {task: collect(task, args) for task in args.tasks}
    results = write_all({task: part for task, part in found.items() if part is not None}, args.results_file)
    print(format_table(results["rows"], results["comparisons"]))
    if results["benchmark"]:
        print(format_inference([results]))
    plot(results["rows"], args.results_file.with_suffix(".png"))
    for task, part in found.items():
        if part is not None:
            publish(task, part, args)
    print(f"The results are {args.results_file}, and its plot; the cards are in {args.cards_dir}.")


def parse_flags() -> tuple[argparse.Namespace, dict[str, list[str]]]:
    """Our own arguments, and those of the recipes: `data`, `export`, `training`, and `distill` alone."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tasks", nargs="+", choices=TEACHER_EPOCHS, default=list(TEACHER_EPOCHS), metavar="TASK")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="the first one's student is published")
    parser.add_argument("--glue_dir", type=Path, help="the official GLUE files, in place of the Hub")
    parser.add_argument("--emotion_dir", type=Path, help="train.txt and val.txt (text;label), in place of the Hub")
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="what teachers start from")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/results"), help="where the runs are")
    parser.add_argument("--only_aggregate", action="store_true", help="run nothing; take what is complete")
    parser.add_argument("--results_file", type=Path, default=RECIPES / "results" / "glue.json")
    parser.add_argument("--cards_dir", type=Path, default=RECIPES.parent / "model_cards")
    parser.add_argument("--hub_namespace", help="user or organisation in the cards' names: NAMESPACE/sst2-student")
    name = "single_gpu.yaml" if torch.cuda.is_available() else "cpu.yaml"
    config = RECIPES / "accelerate_configs" / name
    parser.add_argument("--accelerate_config", type=Path, default=config, help="how the trainings are launched")
    args, words = parser.parse_known_args()
    names: dict[str, Any] = {"training": TrainingArguments, "export": ExportArguments, "data": DataArguments}
    owners = {f.name: owner for owner, arguments in names.items() for f in dataclasses.fields(arguments)}
    flags: dict[str, list[str]] = {owner: [] for owner in (*names, "distill")}
    owner = None
    for word in words:
        if word.startswith("--"):
            owner = owners.get(word[2:].partition("=")[0].removeprefix("no_"), "distill")
        elif owner is None:
            parser.error(f"{word!r} belongs to no flag.")
        flags[owner].append(word)
    return args, flags


# The runs of a task


def make_runs(task: str, args: argparse.Namespace, flags: dict[str, list[str]]) -> None:
    """Teacher, and for each seed the students and the export; a step that is complete is not run again."""
    data = [*data_flags(task, args), *flags["data"]]
    teacher = args.work_dir / task / "teacher"
    resume = ["--resume_from_checkpoint", "true"]
    settings = ["--num_train_epochs", TEACHER_EPOCHS[task], "--learning_rate", TEACHER_LEARNING_RATE]
    settings += ["--model_name_or_path", args.encoder, *resume, "--output_dir", teacher, *flags["training"]]
    train("glue_finetune.py", teacher, [*data, *settings], args)
    for seed in args.seeds:
        student = student_folder(task, seed, args)
        settings = ["--teacher_model_name_or_path", teacher, "--run_baseline", "--seed", seed, *resume]
        settings += ["--eval_teacher_agreement", "true", "--output_dir", student]
        settings += [*flags["training"], *flags["distill"]]
        check_teacher(student, teacher)
        train("glue_distill.py", student, [RECIPES / "configs" / f"{task}.yaml", *data, *settings], args)
        settings = ["--model_dir", student, "--output_dir", student, "--benchmark"]
        settings += ["--max_metric_drop", f"{max_metric_drop(student):.4f}"]
        if seed == args.seeds[0]:
            settings += ["--teacher_model_name_or_path", teacher, *flags["export"]]
        else:
            settings += QUICK
        export(student, [*data, *settings])


def data_flags(task: str, args: argparse.Namespace) -> list[Any]:
    if task == EMOTION.name:
        files = write_emotion(args.work_dir / task / "data", args.emotion_dir)
        return ["--train_file", files["train"], "--validation_file", files["validation"]]
    # The configuration of the student names the task too.
    return ["--task_name", task, *(["--glue_dir", args.glue_dir] if args.glue_dir is not None else [])]


def student_folder(task: str, seed: int, args: argparse.Namespace) -> Path:
    return args.work_dir / task / f"student-seed{seed}"


def check_teacher(student: Path, teacher: Path) -> None:
    """Note in a student's folder which teacher teaches it, and refuse another one's students."""
    digest = hashlib.sha256()
    for path in sorted(teacher.glob("*.safetensors")):
        digest.update(path.read_bytes())
    file = student / "teacher.sha256"
    if file.is_file() and file.read_text(encoding="utf-8").strip() != digest.hexdigest():
        raise SystemExit(
            f"{student} was distilled from another teacher than the one that is now in {teacher}. Move the student's "
            "folder away to have it run again, or put its teacher back."
        )
    student.mkdir(parents=True, exist_ok=True)
    write_whole(file, digest.hexdigest() + "\n")


def train(recipe: str, folder: Path, flags: Sequence[Any], args: argparse.Namespace) -> None:
    """One training under the launcher, unless its results are there; then its checkpoints are needed no more."""
    words = [str(word) for word in (RECIPES / recipe, *flags)]
    results = results_of(folder)
    if is_trained(recipe, folder, results):
        recorded = results.get("training_run", results["run"])["command"]
        if not is_same_command(recorded, words):
            raise SystemExit(
                f"{folder} holds the run of\n{recorded}\nand not of\n{shlex.join(words)}\nMove the folder away to "
                "have it run again, or give another --work_dir."
            )
        print(f"{folder} is trained already.")
        return
    run("-m", "accelerate.commands.launch", "--config_file", args.accelerate_config, *words)
    if not is_trained(recipe, folder, results_of(folder)):
        raise SystemExit(f"{recipe} left {folder} incomplete; what is complete is kept for the next call.")
    for checkpoint in [*folder.glob("checkpoint-*"), *folder.glob("baseline/checkpoint-*")]:
        shutil.rmtree(checkpoint)


def is_trained(recipe: str, folder: Path, results: dict[str, Any]) -> bool:
    roles = {row["role"] for row in results.get("rows", [])}
    if recipe == "glue_finetune.py":
        return "teacher" in roles
    is_complete = "distillation" in results and (folder / "predictions.json").is_file()
    return is_complete and {"teacher", "baseline", "student"} <= roles


def export(folder: Path, flags: Sequence[Any]) -> None:
    """Export and measure, unless this very export is there. It is short: with other flags it is made anew."""
    words = [str(word) for word in (RECIPES / "export_onnx.py", *flags)]

    def is_done(results: dict[str, Any]) -> bool:
        return is_exported(results) and is_same_command(results["run"]["command"], words)

    if is_done(results_of(folder)):
        print(f"{folder} is exported already.")
        return
    run(*words)
    results = results_of(folder)
    if not is_done(results):
        raise SystemExit(f"export_onnx.py left {folder} incomplete; what is complete is kept for the next call.")
    if "benchmark" not in results:
        print(f"{folder} has no int8 file that keeps the metric, and no figures of int8.")


def is_exported(results: dict[str, Any]) -> bool:
    """A quantisation that failed is a result too."""
    quantization = results.get("export", {}).get("quantization") or {}
    return "benchmark" in results or bool(quantization.get("failed"))


def max_metric_drop(student: Path) -> float:
    """What int8 may lose on the dev rows: half a point, or two rows where these are more."""
    num_rows = len(read_json(student / "predictions.json")["labels"])
    return max(0.005, 2.5 / num_rows)


def run(*words: str | Path) -> None:
    """Run Python as a user would, whatever comes of it."""
    command = [sys.executable, *map(str, words)]
    print(shlex.join(["python", *command[1:]]), flush=True)
    subprocess.run(command)


def is_same_command(recorded: str, words: Sequence[str]) -> bool:
    """Whether a results file is of this command, whatever the folders of its paths, which it leaves out in part."""

    def names(command: str) -> list[str]:
        parts = [word.rpartition("=") for word in shlex.split(command)]
        return [f"{flag}{equals}{Path(value).name if '/' in value else value}" for flag, equals, value in parts]

    return names(recorded) == names(describe_command(words))


def results_of(folder: Path) -> dict[str, Any]:
    return read_results(folder / "results.json") if (folder / "results.json").is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_emotion(folder: Path, emotion_dir: Path | None) -> dict[str, Path]:
    """The emotion data as CSV files; from the Hub, or from `text;label` lines below a header."""
    files = {split: folder / f"{split}.csv" for split in ("train", "validation")}
    if all(path.is_file() for path in files.values()):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    for split, path in files.items():
        rows = read_emotion(split, emotion_dir)
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([("text", "label"), *rows])
        write_whole(path, text.getvalue())
    return files


def read_emotion(split: str, emotion_dir: Path | None) -> list[tuple[str, str]]:
    if emotion_dir is None:
        import datasets

        data = datasets.load_dataset("dair-ai/emotion", "split", split=split)
        names = data.features["label"].names
        return [(row["text"], names[row["label"]]) for row in data]
    path = emotion_dir / {"train": "train.txt", "validation": "val.txt"}[split]
    if not path.is_file():
        raise SystemExit(f"{path} does not exist; --emotion_dir is the folder of train.txt and val.txt.")
    _, *lines = path.read_text(encoding="utf-8").split("\n")
    rows = [line.rpartition(";") for line in lines if line.strip()]
    return [(text.strip(), label.strip()) for text, _, label in rows]


# What they measured


def collect(task: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """Rows, comparison, benchmark and runs of a task; `None` if any of its runs is missing."""
    folders = {seed: student_folder(task, seed, args) for seed in args.seeds}
    all_results = {seed: results_of(folder) for seed, folder in folders.items()}
    for seed, folder in folders.items():
        if not (is_trained("glue_distill.py", folder, all_results[seed]) and is_exported(all_results[seed])):
            print(f"{task} is left out: {folder} is not complete.")
            return None
    teacher_results = results_of(args.work_dir / task / "teacher")
    by_role: dict[str, list[dict[str, Any]]] = {"teacher": [], "baseline": [], "student": [], "int8": []}
    runs = {f"{task}/teacher": teacher_results["run"]} if teacher_results else {}
    for seed, results in all_results.items():
        runs[f"{task}/{folders[seed].name}"] = results["training_run"]
        # The published student's file holds the rows of all seeds.
        rows = {row["role"]: row for row in results["rows"] if row["seed"] in (seed, None) and row["role"] != "int8"}
        by_role["teacher"] = by_role["teacher"] or [rows["teacher"]]
        for role in ("baseline", "student"):
            by_role[role].append(rows[role])
        for measured in results.get("benchmark", []):
            if measured["precision"] == "int8":
                found = {name: measured[name] for name in ("metrics", "main_metric", "size_bytes")}
                by_role["int8"].append({**rows["student"], "role": "int8", **found})
    first = all_results[args.seeds[0]]
    return {
        "rows": [{**row, "task": task} for rows in by_role.values() for row in rows],
        "comparisons": [compare(task, folders)],
        "benchmark": [{**row, "task": task} for row in first.get("benchmark", [])],
        "runs": runs,
    }


def compare(task: str, folders: dict[int, Path]) -> dict[str, Any]:
    """Whether the distilled students differ from those without distillation by more than the dev rows explain."""
    found = [read_json(folder / "predictions.json") for folder in folders.values()]
    for folder, other in zip(folders.values(), found, strict=True):
        if other["labels"] != found[0]["labels"]:
            raise SystemExit(f"{folder} was measured on other rows than the seeds before it; run it again.")
    roles = [[one["predictions"][role] for one in found] for role in ("student", "baseline")]
    result = paired_bootstrap(GLUE_TASKS.get(task, EMOTION), found[0]["labels"], *roles)
    return {"task": task, "split": found[0]["split"], "seeds": list(folders), **result}


def write_all(found: dict[str, dict[str, Any]], path: Path) -> dict[str, Any]:
    """One file for all tasks; those that this call is not about stay as they are there."""
    before = read_results(path) if path.is_file() else {}
    results: dict[str, Any] = {}
    for section in ("rows", "comparisons", "benchmark"):
        of_task: dict[str, list[dict[str, Any]]] = {}
        for row in before.get(section, []):
            of_task.setdefault(row["task"], []).append(row)
        of_task |= {task: part[section] for task, part in found.items()}
        results[section] = [row for task in TEACHER_EPOCHS for row in of_task.get(task, [])]
    runs = {name: run for name, run in before.get("runs", {}).items() if name.partition("/")[0] not in found}
    results["runs"] = runs | {name: run for part in found.values() for name, run in part["runs"].items()}
    if not results["rows"]:
        raise SystemExit("no task is complete; run this without --only_aggregate.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_results(path, **results)
    return results


def publish(task: str, part: dict[str, Any], args: argparse.Namespace) -> None:
    """The card of the first seed's student, with the rows of all seeds."""
    folder = student_folder(task, args.seeds[0], args)
    results = {**results_of(folder), "rows": part["rows"], "comparisons": part["comparisons"]}
    write_results(folder / "results.json", **results)
    name = f"{task}-student"
    facts: dict[str, Any] = {"repo_id": f"{args.hub_namespace}/{name}" if args.hub_namespace else name}
    if task == EMOTION.name:
        facts |= {"dataset_name": task, "language": "en"}
        facts |= {"datasets": "dair-ai/emotion"} if args.emotion_dir is None else {}
    with card_problems_warn():
        card = write_model_card(folder, **facts)
        args.cards_dir.mkdir(parents=True, exist_ok=True)
        copy_card(card, args.cards_dir / f"{task}.md")


def copy_card(card: Path, copy: Path) -> None:
    """A card under another name, with its picture beside it under that name too: all tasks' cards share a folder."""
    from PIL import Image  # it comes with matplotlib

    text, picture = card.read_text(encoding="utf-8"), copy.with_suffix(".png")
    link = "](pareto.png)"
    if link in text:
        with whole_file(picture) as beside, Image.open(card.with_name("pareto.png")) as image:
            # Repositories hold these: with a palette for its few colours a drawing has a third of the bytes.
            image.convert("RGB").quantize(64).save(beside, format="PNG", optimize=True)
    else:
        picture.unlink(missing_ok=True)
    write_whole(copy, text.replace(link, f"]({picture.name})"))


if __name__ == "__main__":
    main()
