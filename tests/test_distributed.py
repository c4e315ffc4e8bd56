"""What two processes must give: the result of one. Each test starts two real gloo processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).parent / "scripts" / "train_tiny.py"

pytestmark = pytest.mark.distributed


def launch(script, *args, processes=2, check=True, config=None):
    """Run a script under `accelerate launch` with the shipped CPU configs."""
    name = config or ("cpu.yaml" if processes == 1 else "cpu_2proc.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "recipes" / "accelerate_configs" / name), str(script), *map(str, args)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    if check:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result


def train(tmp_path, processes, batch_size, **changes):
    output = tmp_path / f"out_{processes}_{batch_size}"
    settings = {"batch_size": batch_size, "output": str(output), **changes}
    launch(SCRIPT, json.dumps(settings), processes=processes)
    found = [json.loads((output / f"rank_{rank}.json").read_text()) for rank in range(processes)]
    assert [rank["world_size"] for rank in found] == [processes] * processes
    for rank in range(processes):
        # Linux names them; elsewhere there is nothing to see.
        threads = json.loads((output / f"threads_{rank}.json").read_text())
        assert not [thread for thread in threads if "gloo" in thread]
    return found


def assert_two_equal_one(tmp_path, **changes):
    """Both ranks end with the weights, projections and logged terms of one process with the same batches."""
    (one,) = train(tmp_path, 1, 8, **changes)
    two = train(tmp_path, 2, 4, **changes)
    for rank in two:
        assert rank["student"] == pytest.approx(one["student"], abs=2e-6)
        assert rank["projections"] == pytest.approx(one["projections"], abs=2e-6)
        # Synchronised, not only close: the ranks' own copies must never drift apart.
        assert rank["student"] == two[0]["student"] and rank["projections"] == two[0]["projections"]
        # A teacher under DDP costs memory, and fails: no parameter of it requires a gradient.
        assert (rank["student_class"], rank["teacher_class"]) == (
            "DistributedDataParallel",
            "BertForSequenceClassification",
        )
    for log, expected in zip(two[0]["logs"], one["logs"], strict=True):
        assert set(log) == set(expected)
        for name, value in expected.items():
            assert log[name] == pytest.approx(value, rel=1e-4), name
    return one


def test_two_processes_equal_one(tmp_path):
    """Means per process are not the mean of the batch when lengths and labels are ragged; gradients would differ."""
    one = assert_two_equal_one(tmp_path, student={"hidden_size": 16}, unlabeled_share=0.5)
    assert len(one["projections"]) == 2 * (16 * 32 + 32)


def test_two_stages_on_two_processes(tmp_path):
    """In each stage the head or the projections get no gradient from any term, and DDP waits for one of each."""
    stages = {
        "hidden_loss_schedule": "window:0:0.5",
        "attention_loss_schedule": "window:0:0.5",
        "task_loss_schedule": "window:0.5:1",
        "logit_loss_schedule": "window:0.5:1",
        "relation_loss_weight": 0.5,
        "relation_loss_schedule": "linear:1:0.5",
    }
    one = assert_two_equal_one(
        tmp_path, student={"hidden_size": 16}, unlabeled_share=0.5, max_steps=4, arguments=stages
    )
    layers = {"loss", "hidden_loss", "attention_loss", "relation_loss"}
    predictions = {"loss", "task_loss", "logit_loss", "relation_loss"}
    assert [set(log) for log in one["logs"]] == [layers, predictions]


def test_a_sharded_teacher_says_the_same(tmp_path):
    """Under FSDP2 a whole teacher on each GPU takes the room that sharding the student made."""
    launch(SCRIPT.with_name("shard_teacher.py"), tmp_path)
    for rank in range(2):
        for found in json.loads((tmp_path / f"shares_{rank}.json").read_text()):
            assert found == {"is_equal": True, "share": pytest.approx(0.5, abs=0.05), "hash": True}
