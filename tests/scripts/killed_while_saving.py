"""Trains, and dies at a point of its second checkpoint: killed, or without room on the disk. Prints what is left."""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import torch
from conftest import VOCAB, make_dataset, make_model
from soak import digest, flatten
from transformers import BertTokenizerFast, DataCollatorWithPadding
from transformers.trainer_utils import get_last_checkpoint

import hf_kd.resumption
from hf_kd import DistillationTrainer, DistillationTrainingArguments


STEPS, SAVE_STEPS = 6, 2
# Where it is killed in the second of three checkpoints: a method of the trainer, and whether it has run by then.
KILLED = {
    "nothing is written": ("_save", False),
    "the model is written": ("_save", True),
    "the optimizer is written": ("_save_optimizer_and_scheduler", True),
    "random numbers are written": ("_save_rng_state", True),
    "all is written, nothing moved": ("_move", False),
    "moved": ("_move", True),
}
output = Path(sys.argv[1])
output.mkdir(parents=True)
(output / "vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")


def make_trainer(folder, **changes):
    torch.set_num_threads(1)
    settings = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    settings |= {"logging_steps": 3, "use_cpu": True, "report_to": [], "disable_tqdm": True, **changes}
    args = DistillationTrainingArguments(output_dir=str(folder), hidden_loss_weight=1.0, **settings)
    tokenizer = BertTokenizerFast.from_pretrained(output, model_max_length=80)
    student = make_model(seed=2, num_hidden_layers=2, hidden_size=16)
    return DistillationTrainer(
        student,
        args,
        teacher_model=make_model(seed=1),
        train_dataset=make_dataset(20),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def kill_at(trainer, method, is_after):
    original, calls = getattr(trainer, method), []

    def at_the_second(*args, **kwargs):
        calls.append(trainer.state.global_step)
        is_second = trainer.state.global_step == 2 * SAVE_STEPS
        if is_second and not is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if is_second and is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(trainer, method, at_the_second)


def fill_the_disk_at(trainer, limit):
    """From the second checkpoint on, no file can grow beyond `limit` bytes: the system's own error."""
    original = trainer._save_checkpoint

    def save(*args, **kwargs):
        if trainer.state.global_step == 2 * SAVE_STEPS:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return original(*args, **kwargs)

    trainer._save_checkpoint = save


def in_a_process(function):
    """Run a function in a process of its own; its exit code, negative for a signal, and what it returned."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        log = os.open(output / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            found, code = function(), 0
        except BaseException as error:
            found, code = f"{type(error).__name__}: {error}", 1
        os.write(writer, json.dumps(found).encode())
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    return {"code": os.waitstatus_to_exitcode(status), "found": json.loads(text) if text else None}


def train(folder, prepare=None, resume=False, **changes):
    trainer = make_trainer(folder, **changes)
    if prepare is not None:
        prepare(trainer)
    trainer.train(resume_from_checkpoint=True if resume else None)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "weights": digest(trainer.model.state_dict()),
        "projections": digest(trainer.distillation_objective.state_dict()),
        "optimizer": digest(flatten(trainer.optimizer.state_dict())),
        "logs": logs,
        "at": trainer.resume_notes.steps,
    }


def listing(folder):
    last = get_last_checkpoint(folder)
    return {"last": None if last is None else Path(last).name, "files": sorted(p.name for p in Path(folder).iterdir())}


results = {"whole": in_a_process(lambda: train(output / "whole"))}
for name, (method, is_after) in KILLED.items():
    folder = output / name
    died = in_a_process(lambda: train(folder, lambda t: kill_at(t, method, is_after)))  # noqa: B023
    left = listing(folder)
    results[name] = {"died": died, "left": left, "resumed": in_a_process(lambda: train(folder, resume=True))}  # noqa: B023
    results[name]["after"] = listing(folder)
for name, limit in {"full at the model": 2000, "full at the optimizer": 70_000}.items():
    folder = output / name
    died = in_a_process(lambda: train(folder, lambda t: fill_the_disk_at(t, limit)))  # noqa: B023
    left = listing(folder)
    results[name] = {"died": died, "left": left, "resumed": in_a_process(lambda: train(folder, resume=True))}  # noqa: B023


def save_model_on_a_full_disk():
    """Over a model that is there."""
    trainer = make_trainer(output / "whole")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    trainer.save_model()


in_a_process(lambda: make_trainer(output / "whole").save_model())
before = {path.name: path.read_bytes() for path in (output / "whole").iterdir() if path.is_file()}
results["model"] = in_a_process(save_model_on_a_full_disk)
after = {path.name: path.read_bytes() for path in (output / "whole").iterdir() if path.is_file()}
results["model"] |= {"is_unchanged": before == after, "files": sorted(after), **listing(output / "whole")}
assert hf_kd.resumption.STAGING_NAME not in os.listdir(output / "whole")
sys.stdout.write(json.dumps(results) + "\n")
shutil.rmtree(output)
