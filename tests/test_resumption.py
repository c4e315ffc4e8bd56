"""What a run that was killed, or found no room, leaves behind, and how it goes on."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soak
import torch
from conftest import copy_of, make_dataset, make_model, weights
from test_distributed import ROOT, SCRIPT
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_kd import DistillationTrainer
from hf_kd.compat import length_grouping
from hf_kd.resumption import STAGING_NAME, SeededPerEpoch, sampler_of


def run_python(*words):
    """Run a script that prints what it found, in a process that can be forked: no model has run in it."""
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "tests", "recipes"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


# Killed, or out of room: the checkpoint that is left


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Real processes that die while they save their second checkpoint."""
    return run_python(SCRIPT.with_name("killed_while_saving.py"), tmp_path_factory.mktemp("killed") / "runs")


@pytest.mark.parametrize(
    ("point", "last"),
    [
        ("nothing is written", "checkpoint-2"),
        ("the model is written", "checkpoint-2"),
        ("the optimizer is written", "checkpoint-2"),
        ("random numbers are written", "checkpoint-2"),
        ("all is written, nothing moved", "checkpoint-2"),
        ("moved", "checkpoint-4"),
    ],
)
def test_killed_while_saving(killed, point, last):
    """transformers takes the newest folder for the newest checkpoint, whatever is missing in it."""
    found = killed[point]
    assert found["died"]["code"] == -9
    assert found["left"]["last"] == last
    # It goes on from there, to the weights and the logs of the run that was not killed.
    assert_goes_on(found, killed["whole"], last)
    assert found["after"]["files"] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def assert_goes_on(found, whole, last):
    """To the last bit. A run that began anew would end with the same."""
    resumed, expected = found["resumed"], whole
    digests = [expected["found"][name] for name in ("weights", "projections", "optimizer")]
    assert len(set(digests)) == 3 and {len(digest) for digest in digests} == {64}
    assert resumed["found"].pop("at") == [int(last.rpartition("-")[2])]
    assert resumed == {**expected, "found": {key: x for key, x in expected["found"].items() if key != "at"}}


@pytest.mark.parametrize("point", ["full at the model", "full at the optimizer"])
def test_disk_full_while_saving(killed, point):
    """A half checkpoint takes the room that the next one needs, and is found first."""
    found = killed[point]
    assert found["died"]["code"] == 1
    message = found["died"]["found"]
    assert "OSError: the checkpoint of step 4 could not be written into" in message
    assert "make room" in message and "resume_from_checkpoint=True" in message
    assert found["left"] == {"last": "checkpoint-2", "files": ["checkpoint-2"]}
    assert_goes_on(found, killed["whole"], "checkpoint-2")


def test_disk_full_while_saving_the_model(killed):
    """The student that was there is the result of hours."""
    found = killed["model"]
    assert found["code"] == 1 and "OSError: the model could not be written into" in found["found"]
    assert found["is_unchanged"] and "model.safetensors" in found["files"]


# Resumed: the run that nobody stopped


@pytest.mark.parametrize("name", ["cached teacher, accumulation", "projections and schedules, two processes"])
def test_killed_at_random_moments(tmp_path, name):
    """Bit for bit: weights, projections, optimizer, learning rates, logs and random numbers."""
    script = (
        "import json, pathlib, random, sys, soak;"
        "print(json.dumps(soak.soak(pathlib.Path(sys.argv[1]), sys.argv[2], 5, random.Random(0))))"
    )
    found = run_python("-c", script, tmp_path / "run", name)
    assert (
        found["differences"] == []
        and found["kills"] >= 2
        and max(found["resumed_at"]) > 0
        and found["steps"] in (18, 36)
    )


def test_the_comparison_sees_a_difference():
    """A digest of nothing would be equal for ever."""
    assert soak.digest({"a": torch.ones(2)}) != soak.digest({"a": torch.ones(2) + 1e-7})
    state = {"state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
    assert set(soak.flatten(state)) == {".state.0.exp_avg", ".state.0.step", ".param_groups.0.lr"}
    assert len(soak.make_rows(5, seed=0)) == 5 and random.Random(0).random() == random.Random(0).random()


class Order(TrainerCallback):
    """The rows of each batch, by their first word, and the logs."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({key: x for key, x in logs.items() if not key.startswith("train_")})


def train(student, teacher, args, collator, resume=None, **kwargs):
    record = Order()
    trainer = DistillationTrainer(
        copy_of(student),
        args,
        teacher_model=copy_of(teacher),
        train_dataset=make_dataset(26),
        data_collator=collator,
        callbacks=[record],
        **kwargs,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, record


@pytest.mark.parametrize("accumulated", [1, 2])
def test_resumed_within_an_epoch_of_grouped_batches(teacher, collator, make_args, accumulated):
    """The order of the second epoch came from what dropout had left of the random numbers: rows were seen twice, and
    others not; and the first mean in the log left out the steps before the checkpoint."""
    student = make_model(seed=2, num_hidden_layers=2, hidden_dropout_prob=0.1)
    changes = {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 4, "logging_steps": 3}
    changes |= {"gradient_accumulation_steps": accumulated, "save_strategy": "steps", "save_steps": 1}
    args = make_args(**changes, **length_grouping())
    whole, expected = train(student, teacher, args, collator)
    steps_per_epoch = whole.state.max_steps // 3
    for step in (1, steps_per_epoch, steps_per_epoch + 1, 2 * steps_per_epoch + 2):
        checkpoint = os.path.join(args.output_dir, f"checkpoint-{step}")
        again = make_args(
            **{**changes, "save_strategy": "no", "output_dir": args.output_dir + "2"}, **length_grouping()
        )
        resumed, found = train(student, teacher, again, collator, resume=checkpoint)
        assert torch.equal(weights(resumed.model), weights(whole.model)), step
        assert found.logs == expected.logs[-len(found.logs) :], step
        assert len(found.logs) >= (whole.state.max_steps - step) // 3


def test_grouped_batches_are_drawn_from_the_seed_alone(teacher, student, collator, make_args):
    """Every process has used up another part of its random numbers; each would draw batches of its own."""
    trainer, _ = train(student, teacher, make_args(**length_grouping()), collator)
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, SeededPerEpoch) and len(sampler) == 26
    first = list(sampler)
    torch.rand(100)
    assert list(sampler) == first and sorted(first) == list(range(26))
    sampler.set_epoch(1)
    assert list(sampler) != first and sorted(sampler) == list(range(26))
    assert isinstance(sampler_of(trainer.get_train_dataloader()), SeededPerEpoch)


def test_a_complete_run_trains_no_further_step(teacher, student, collator, make_args):
    """transformers trains one more where a run of max_steps ended within an epoch: what was measured is not what is
    saved."""
    saving = {"max_steps": 5, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 5}
    whole, _ = train(student, teacher, make_args(**saving), collator)
    again, _ = train(student, teacher, make_args(**saving), collator, resume=True)
    assert again.state.global_step == 5
    assert torch.equal(weights(again.model), weights(whole.model))


# What is written


def test_the_best_checkpoint_is_where_it_is_noted(teacher, student, collator, make_args):
    """It is noted while the checkpoint is still beside its place; the best model would not be found in the end."""
    changes = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 5}
    changes |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 2}
    changes |= {"learning_rate": 0.02}
    args = make_args(**changes)
    trainer, _ = train(student, teacher, args, collator, eval_dataset=make_dataset(8, seed=5))
    assert trainer.state.best_global_step < 5  # or nothing would have to be loaded
    best = trainer.state.best_model_checkpoint
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert Path(best) == Path(args.output_dir, f"checkpoint-{1 + losses.index(min(losses))}")
    left = sorted(path.name for path in Path(args.output_dir).iterdir())
    assert left == sorted({Path(best).name, "checkpoint-5", *(["checkpoint-4"] if best.endswith("5") else [])})
    found = type(trainer.model).from_pretrained(best)
    assert torch.equal(weights(found), weights(trainer.model))
    # In another place, and after the end: the best is still known, and loaded.
    moved = args.output_dir + " moved"
    os.rename(args.output_dir, moved)
    again = make_args(**changes, output_dir=moved)
    resumed, _ = train(student, teacher, again, collator, resume=True, eval_dataset=make_dataset(8, seed=5))
    assert Path(resumed.state.best_model_checkpoint) == Path(moved, Path(best).name)
    assert torch.equal(weights(resumed.model), weights(trainer.model))


def test_a_checkpoint_replaces_one_of_an_earlier_run(teacher, student, collator, make_args):
    """Resumed from the second of three, the third is there already, of a run with other arguments perhaps."""
    saving = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    args = make_args(**saving)
    train(student, teacher, args, collator)
    checkpoint = Path(args.output_dir, "checkpoint-3")
    (checkpoint / "of the run before").touch()
    (Path(args.output_dir) / STAGING_NAME / "checkpoint-9").mkdir(parents=True)  # killed while it saved
    assert get_last_checkpoint(args.output_dir) == str(checkpoint)
    train(student, teacher, args, collator, resume=str(checkpoint.with_name("checkpoint-2")))
    assert not (checkpoint / "of the run before").exists() and (checkpoint / "optimizer.pt").is_file()
    assert sorted(path.name for path in Path(args.output_dir).iterdir()) == [f"checkpoint-{i}" for i in (1, 2, 3)]


def test_no_pickle_with_the_arguments(teacher, student, collator, make_args):
    """training_args.bin holds the user's paths and token, in a form that runs code when it is loaded."""
    args = make_args(save_strategy="steps", save_steps=2, hub_token="hf_" + 34 * "x")
    trainer, _ = train(student, teacher, args, collator)
    trainer.save_model()
    files = [path for path in Path(args.output_dir).rglob("*") if path.is_file()]
    assert {"model.safetensors", "optimizer.pt"} <= {path.name for path in files}
    assert [
        path for path in files if path.name == "training_args.bin" or args.hub_token.encode() in path.read_bytes()
    ] == []


def test_checkpoints_of_the_trainer_are_resumed(teacher, student, collator, make_args):
    """They know nothing of what this trainer notes: after hours, the next save failed."""
    saving = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "task_loss_weight": 1.0,
        "logit_loss_weight": 0.0,
    }
    args = make_args(**saving)
    plain = Trainer(copy_of(student), args, train_dataset=make_dataset(26), data_collator=collator)
    plain.train()
    shutil.rmtree(Path(args.output_dir, "checkpoint-4"))
    resumed, _ = train(student, teacher, make_args(**saving), collator, resume=True)
    assert torch.equal(weights(resumed.model), weights(plain.model)) and resumed.resume_notes.steps == [2]


def test_callbacks_are_restored(teacher, student, collator, make_args):
    """With this argument transformers makes them anew, from what they saved."""
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, _ = train(student, teacher, make_args(**saving), collator)
    checkpoint = os.path.join(whole.args.output_dir, "checkpoint-2")
    again = make_args(**saving, restore_callback_states_from_checkpoint=True)
    resumed, _ = train(student, teacher, again, collator, resume=checkpoint)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.resume_notes.steps == [2]


def test_what_a_killed_run_left_is_not_saved_with_the_model(teacher, student, collator, make_args):
    """A part of a checkpoint would be taken for a whole one."""
    trainer, _ = train(student, teacher, make_args(), collator)
    output = Path(trainer.args.output_dir)
    left = output / STAGING_NAME / "checkpoint-9" / "optimizer.pt"
    left.parent.mkdir(parents=True)
    left.touch()
    (output / "model-00001-of-00002.safetensors").touch()  # of a larger model that was saved here
    (output / "model_v1.safetensors").touch()  # of the user, and loaded by nobody
    trainer.save_model()
    assert get_last_checkpoint(output) is None and not left.exists()
    assert sorted(path.name for path in output.glob("*.safetensors")) == ["model.safetensors", "model_v1.safetensors"]
