"""Kill trainings at random moments, resume them, and compare with the same training that nobody killed.

python recipes/soak.py --kills 50 --results_file recipes/results/soak.json

Each training is a tiny student with dropout on generated rows, of one process or two, with what a run can have:
projections, schedules, a teacher that is read from the disk, gradient accumulation, batches grouped by length, logs
and evaluations that no checkpoint coincides with. It saves after every second step, so that many a SIGKILL finds it
saving. After the last kill it runs to its end: weights, projections, optimizer, learning rates, logs and random
numbers must be those of the training that was not killed, to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizerFast,
    DataCollatorWithPadding,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_kd import DistillationTrainer, DistillationTrainingArguments, cache_teacher_signals
from hf_kd.command_line import parse_args, run_main
from hf_kd.compat import length_grouping
from hf_kd.results import write_results
from hf_kd.resumption import STAGING_NAME


LAYERS = {"hidden_loss_weight": 1.0, "attention_loss_weight": 1.0}
SCHEDULES = {
    "hidden_loss_schedule": "window:0:0.6",
    "logit_loss_schedule": "linear:0.2:1",
    "temperature_schedule": "cosine:2:1",
}
RELATIONS = {"relation_loss_weight": 1.0, "relation_loss_type": "crd"}
BEST = {"load_best_model_at_end": True, "eval_steps": 2}
# What the killed trainings are: number of processes, and arguments.
TRAININGS: dict[str, dict[str, Any]] = {
    "projections and schedules": {"hidden_size": 16, "arguments": {**LAYERS, **SCHEDULES}},
    "cached teacher, accumulation": {
        "is_cached": True,
        "arguments": {**LAYERS, "gradient_accumulation_steps": 2, **length_grouping()},
    },
    "projections and schedules, two processes": {
        "processes": 2,
        "hidden_size": 16,
        "arguments": {**LAYERS, **SCHEDULES, **length_grouping(), **BEST},
    },
    "cached teacher, two processes": {"processes": 2, "is_cached": True, "arguments": {**LAYERS, **RELATIONS}},
}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{index}" for index in range(59))]
NUM_ROWS, BATCH_SIZE, EPOCHS = 90, 8, 3  # the last batch of an epoch is incomplete
# Of the moment and the machine, and of the part of the training that a process ran.
_NOT_COMPARED = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}


@dataclass
class SoakArguments:
    """How often is killed, and where it is written."""

    kills: int = field(default=50, metadata={"help": "SIGKILLs in all."})
    kills_per_training: int = field(default=5, metadata={"help": "Of each training, before it may run to its end."})
    trainings: list[str] = field(
        default_factory=lambda: list(TRAININGS), metadata={"help": f"Some of {', '.join(map(repr, TRAININGS))}."}
    )
    seed: int = field(default=0, metadata={"help": "Of the moments."})
    results_file: Path = field(default=Path("runs/soak.json"), metadata={"help": "What was found."})

    def __post_init__(self) -> None:
        if unknown := set(self.trainings) - set(TRAININGS):
            raise ValueError(f"--trainings {sorted(unknown)} are none of {list(TRAININGS)}.")
        if self.kills < 1 or self.kills_per_training < 1:
            raise ValueError(
                f"--kills {self.kills} and --kills_per_training {self.kills_per_training} must be above 0."
            )


# A training, in processes of its own


def train(folder: Path, name: str, rank: int, port: int, steps_done: Any) -> None:
    """One process of a training, from its last checkpoint if there is one, to its end."""
    training = TRAININGS[name]
    processes = training.get("processes", 1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if processes > 1:
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes}
        rendezvous |= {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({key: str(value) for key, value in rendezvous.items()})
    torch.set_num_threads(1)
    with (folder / f"log_{rank}.txt").open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "logging_steps": 3}
    saving |= {"eval_strategy": "steps", "eval_steps": 5, "report_to": [], "disable_tqdm": True}
    args = DistillationTrainingArguments(
        output_dir=str(folder / "out"),
        use_cpu=True,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH_SIZE // processes,
        learning_rate=1e-2,
        warmup_steps=5,
        **{**saving, **training["arguments"]},
    )
    tokenizer = BertTokenizerFast(vocab_file=str(folder.parent / "vocab.txt"), model_max_length=40)
    teacher = make_model(seed=1, num_hidden_layers=4)
    rows, evaluated = make_rows(NUM_ROWS, seed=3), make_rows(12, seed=4)
    student = make_model(seed=2, num_hidden_layers=2, hidden_size=training.get("hidden_size", 32))
    if training.get("is_cached"):
        objective = args.objective().bind(student.config, teacher.config)
        rows = cache_teacher_signals(rows, teacher, objective.teacher_wanted, folder / "cache")
    trainer = DistillationTrainer(
        student,
        args,
        teacher_model=None if training.get("is_cached") else teacher,
        train_dataset=rows,
        eval_dataset=evaluated,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[Progress(steps_done)] if rank == 0 else [],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir))
    (folder / f"state_{rank}.json").write_text(json.dumps(describe_state(trainer)), encoding="utf-8")
    os._exit(0)  # an open group of processes can abort the exit


class Progress(TrainerCallback):
    """Tells the one who kills how many steps were made since this process began."""

    def __init__(self, steps_done: Any):
        self.steps_done = steps_done

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps_done.value += 1


def describe_state(trainer: DistillationTrainer) -> dict[str, Any]:
    """Everything that a further step would depend on, and what was logged."""
    history = [{key: x for key, x in log.items() if key not in _NOT_COMPARED} for log in trainer.state.log_history]
    return {
        "steps": trainer.state.global_step,
        "best step": trainer.state.best_global_step,
        "resumed at": trainer.resume_notes.steps,
        "weights": digest(trainer.model.state_dict()),
        "projections": digest(trainer.distillation_objective.state_dict()),
        "optimizer": digest(flatten(trainer.optimizer.state_dict())),
        "learning rate": trainer.lr_scheduler.get_last_lr(),
        "random numbers": digest(
            {"torch": torch.get_rng_state(), "numpy": np.random.get_state()[1], "python": random.getstate()[1]}
        ),
        "logs": [{key: x for key, x in log.items() if not is_time(key)} for log in history],
    }


def is_time(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second"))


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for inner, x in items for key, leaf in flatten(x, f"{name}.{inner}").items()}
    return {name: value}


def digest(values: dict[str, Any]) -> str:
    found = hashlib.sha256()
    for name, value in sorted(values.items()):
        found.update(name.encode())
        found.update(np.ascontiguousarray(value).tobytes() if not isinstance(value, str) else value.encode())
    return found.hexdigest()


def make_model(seed: int, **shape: Any) -> Any:
    set_seed(seed)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, **shape}
    config = BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=40, num_labels=2, **shape)
    return AutoModelForSequenceClassification.from_config(config)


def make_rows(num_rows: int, seed: int) -> Dataset:
    rng = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        words = [rng.randrange(5, len(VOCABULARY)) for _ in range(rng.randint(3, 30))]
        label = -100 if rng.random() < 0.2 else rng.randrange(2)
        rows.append({"input_ids": [2, *words, 3], "attention_mask": [1] * (len(words) + 2), "labels": label})
    return Dataset.from_list(rows)


# The one who kills


class Life:
    """The processes of a training, from a start to their end or to a kill."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.began = folder, time.time()
        context = multiprocessing.get_context("fork")  # torch is loaded once
        self.steps_done = context.Value("i", 0, lock=False)  # a killed process would hold the lock for ever
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            context.Process(target=train, args=(folder, name, rank, port, self.steps_done if rank == 0 else None))
            for rank in range(TRAININGS[name].get("processes", 1))
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> None:
        while all(process.exitcode is None for process in self.processes):
            time.sleep(0.05)
        for process in self.processes:
            process.join(timeout=60)  # of two, one that waits for another that failed
            process.kill()
        if any(process.exitcode != 0 for process in self.processes):
            logs = "\n".join(
                path.read_text(encoding="utf-8")[-3000:] for path in sorted(self.folder.glob("log_*.txt"))
            )
            raise RuntimeError(f"the training in {self.folder.name} failed:\n{logs}")

    def wait_for_step(self, number: int) -> None:
        """Or until a process has ended."""
        while self.steps_done.value < number and all(process.is_alive() for process in self.processes):
            time.sleep(0.001)

    def kill_after(self, steps: int, seconds: float) -> bool:
        """SIGKILL all processes so long after so many steps; `False` if the training has ended by then."""
        self.wait_for_step(steps)
        time.sleep(seconds)
        if any(process.exitcode is not None for process in self.processes):
            self.wait()
            return False
        for process in self.processes:
            process.kill()
            process.join()
        return True


def soak(folder: Path, name: str, kills: int, rng: random.Random) -> dict[str, Any]:
    """Run a training undisturbed, then killed so many times; what both end with must be the same."""
    whole, killed = folder / "whole", folder / "killed"
    for run in (whole, killed):
        (run / "out").mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    started = Life(whole, name)
    started.wait_for_step(1)
    start = time.perf_counter()
    started.wait()
    seconds = time.perf_counter() - start
    steps = read(whole, 0)["steps"]
    found: dict[str, Any] = {"training": name, "kills": 0, "while_saving": 0, "resumed_at": [], "steps": steps}
    staging = killed / "out" / STAGING_NAME

    most_steps = max(1, 2 * steps // (kills + 1))
    while found["kills"] < kills:
        life = Life(killed, name)
        # After steps, however slow the machine is, and at any moment of one.
        if not life.kill_after(rng.randint(1, most_steps), rng.uniform(0, seconds / steps)):
            break
        found["kills"] += 1
        found["while_saving"] += staging.is_dir() and staging.stat().st_mtime >= life.began
        last = get_last_checkpoint(killed / "out")
        found["resumed_at"].append(int(last.rpartition("-")[2]) if last is not None else 0)
    if found["kills"] == kills:
        Life(killed, name).wait()
    not_compared = {"resumed at"}
    if found["resumed_at"][-1:] == [steps]:  # no step was left to restore the random numbers for
        not_compared |= {"random numbers"}
    found["differences"] = [
        f"{key} of process {rank}"
        for rank in range(TRAININGS[name].get("processes", 1))
        for key, value in read(whole, rank).items()
        if key not in not_compared and read(killed, rank)[key] != value
    ]
    # A run that begins anew would end with the same.
    resumed_at = sorted({*found["resumed_at"]} - {0, steps})
    found["differences"] += ["where it was resumed"] if read(killed, 0)["resumed at"] != resumed_at else []
    states = [read(killed, rank) for rank in range(TRAININGS[name].get("processes", 1))]
    found["differences"] += ["weights between processes"] if len({state["weights"] for state in states}) > 1 else []
    return found


def read(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"state_{rank}.json").read_text(encoding="utf-8"))


def main() -> None:
    (args,) = parse_args((SoakArguments,))
    rng = random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        while (left := args.kills - sum(row["kills"] for row in rows)) > 0:
            name = args.trainings[len(rows) % len(args.trainings)]
            run = Path(folder, str(len(rows)))
            rows.append(soak(run, name, min(left, args.kills_per_training), rng))
            shutil.rmtree(run)
            print(json.dumps(rows[-1]), flush=True)
    args.results_file.parent.mkdir(parents=True, exist_ok=True)
    write_results(args.results_file, [], kills=rows)
    total, saving = sum(row["kills"] for row in rows), sum(row["while_saving"] for row in rows)
    resumed = sum(step > 0 for row in rows for step in row["resumed_at"])
    different = [row for row in rows if row["differences"]]
    print(
        f"{total} kills, {saving} of them while saving, {resumed} with a checkpoint to resume from, in {len(rows)} "
        f"trainings; {len(different)} ended differently."
    )
    if different or not resumed:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
