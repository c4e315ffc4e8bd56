"""What two processes must give: the result of one. Each test starts two real gloo processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).parent / "scripts" / "train_tiny.py"

pytestmark = pytest.mark.distributed


def launch_command(name, script, *args):
    config = ROOT / "recipes" / "accelerate_configs" / name
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launcher, str(script), *map(str, args)]


def launch_environment(use_cpu=True):
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    device = {"ACCELERATE_USE_CPU": "true"} if use_cpu else {"DS_ACCELERATOR": "cpu"}
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **threads, **device, "PYTHONPATH": os.pathsep.join(paths)}


def launch(script, *args, processes=2, check=True, config=None, use_cpu=True):
    """Run a script under `accelerate launch` with a shipped config, by default that of so many CPU processes."""
    name = config or ("cpu.yaml" if processes == 1 else "cpu_2proc.yaml")
    command, environment = launch_command(name, script, *args), launch_environment(use_cpu)
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


@pytest.mark.one_leg
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
        of_models = json.loads((tmp_path / f"shares_{rank}.json").read_text())
        assert len(of_models) == 3
        for found in of_models:
            assert found == {"is_equal": True, "share": pytest.approx(0.5, abs=0.05), "hash": True}


# The other launchers


TRAIN_AND_RESUME = SCRIPT.with_name("train_and_resume.py")


def read_training(folder):
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("whole", "resumed")]


def assert_same_training(found, expected, tolerance):
    assert found["world_size"] == 2
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][name], weight, rtol=0, atol=tolerance, err_msg=name)
    assert len(found["logs"]) == len(expected["logs"]) == 8  # of six steps and two evaluations
    for log, values in zip(found["logs"], expected["logs"], strict=True):
        assert log == pytest.approx(values, rel=1e-5, abs=tolerance)


@pytest.fixture(scope="module")
def under_ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    launch(TRAIN_AND_RESUME, folder, "whole")
    whole, resumed = read_training(folder)
    assert resumed == whole
    assert whole["student_class"] == "DistributedDataParallel"
    return whole


@pytest.mark.one_leg
@pytest.mark.parametrize(
    ("config", "student_class", "teacher_class", "teacher_share"),
    [
        ("fsdp2", "FSDPBertForSequenceClassification", "FSDPBertForSequenceClassification", 0.5),
        ("zero2", "DeepSpeedEngine", "BertForSequenceClassification", 1.0),
        ("zero3", "DeepSpeedEngine", "FSDPBertForSequenceClassification", 0.5),
    ],
)
def test_sharded_student_is_that_of_ddp(tmp_path, under_ddp, config, student_class, teacher_class, teacher_share):
    """Weights, logs, evaluation beside the teacher, and the resumed run; hooks read students in pieces, too."""
    if config.startswith("zero"):
        pytest.importorskip("deepspeed", reason="install deepspeed")
    launch(TRAIN_AND_RESUME, tmp_path, "sharded", config=f"{config}.yaml", use_cpu=False)
    whole, resumed = read_training(tmp_path)
    assert resumed == whole
    assert_same_training(whole, under_ddp, tolerance=2e-6)
    assert (whole["student_class"], whole["teacher_class"]) == (student_class, teacher_class)
    refusals = json.loads((tmp_path / "refusals.json").read_text())
    assert "need projections from the student's width 16" in refusals["projections"]
    assert ("would leave none out" in (refusals["skip"] or "")) == config.startswith("zero")
    assert ("each process holds a share" in (refusals["teacher in shares"] or "")) == (config == "zero3")
    assert whole["teacher_numbers"] == pytest.approx(teacher_share * under_ddp["teacher_numbers"], rel=0.05)


@pytest.mark.one_leg
def test_two_machines_are_two_processes(tmp_path, under_ddp):
    """Each has its own launcher, and a first process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines, logs = [], [tmp_path / f"machine_{rank}.txt" for rank in range(2)]
    for rank, log in enumerate(logs):
        command = launch_command("ddp_two_machines.yaml", TRAIN_AND_RESUME, tmp_path, "whole")
        options = {"num_processes": 2, "machine_rank": rank, "main_process_ip": "127.0.0.1", "main_process_port": port}
        command[3:3] = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        with log.open("w") as file:
            machines.append(subprocess.Popen(command, env=launch_environment(), stderr=file, start_new_session=True))
    try:
        codes = [machine.wait(timeout=200) for machine in machines]
    finally:
        for machine in machines:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(machine.pid, signal.SIGKILL)
    assert codes == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    whole, resumed = read_training(tmp_path)
    assert resumed == whole == under_ddp


# Numbers that go wrong in the rows of one process


TRAIN_NONFINITE = SCRIPT.with_name("train_nonfinite.py")


def run_processes(folder, processes):
    """What each process wrote, its exit code and its errors. No launcher ends the one that waits for another."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **ranks} if processes > 1 else {}
        environment = launch_environment() | {name: str(value) for name, value in rendezvous.items()}
        command = [sys.executable, str(TRAIN_NONFINITE), str(folder), str(processes)]
        with (folder / f"log_{rank}.txt").open("w") as log:
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [running[0].wait(timeout=300), *(process.wait(timeout=60) for process in running[1:])]
    finally:
        for process in running:
            process.kill()
    logs = [(folder / f"log_{rank}.txt").read_text() for rank in range(processes)]
    assert all((folder / f"found_{rank}.json").is_file() for rank in range(processes)), logs[-1][-3000:]
    return [json.loads((folder / f"found_{rank}.json").read_text()) for rank in range(processes)], codes, logs


@pytest.fixture(scope="module")
def nonfinite(tmp_path_factory):
    return run_processes(tmp_path_factory.mktemp("nonfinite") / "two", 2)


@pytest.mark.one_leg
def test_a_bad_row_of_one_process_stops_both(nonfinite):
    """The other process would make the step and wait for this one in the next: for minutes, or for ever."""
    (found, _), codes, logs = nonfinite
    assert codes[0] not in (0, None) and codes[1] not in (0, None)
    for log in logs:
        error = log.rpartition("FloatingPointError: ")[2]
        assert error.startswith("the loss is not finite in step 2: logit_loss=nan, hidden_loss=nan; rows ")
        rows = error.partition("rows ")[2].partition(" of train_dataset")[0].split(", ")
        assert len(rows) == 4 and str(found["row"]) in rows  # of the process that has it


@pytest.mark.one_leg
def test_a_bad_row_of_one_process_is_left_out_of_both(nonfinite, tmp_path):
    """Left out by one of them alone, both would train different students from then on."""
    two, _, _ = nonfinite
    (one,), _, _ = run_processes(tmp_path / "one", 1)
    assert two[0]["row"] == one["row"]
    for found in two:
        assert found["a row, left out"] == two[0]["a row, left out"]
        found, expected = found["a row, left out"], one["a row, left out"]
        assert found["error"] is None and found["skipped"] == expected["skipped"]
        assert found["skipped"][:3] == [0, 1, 1] and found["skipped"][-1] == 2  # once in each epoch
        assert found["weights"] == pytest.approx(expected["weights"], abs=2e-6)
        assert found["projections"] == pytest.approx(expected["projections"], abs=2e-6)


@pytest.mark.one_leg
@pytest.mark.parametrize(
    ("term", "said"),
    [
        ("value_alone", "the loss is not finite in step 2: value_alone=inf; rows "),
        ("root", "the gradient is not finite in step 2: root; rows "),
    ],
)
def test_a_bad_term_of_one_process_is_known_to_both(nonfinite, term, said):
    """A value without its gradient is seen by one process alone, a gradient without its value by both."""
    two, _, _ = nonfinite
    for found in two:
        assert said in found[term]["error"] and found[term] == two[0][term] and found[term]["steps"] == 1
        left_out = found[f"{term}, left out"]
        assert left_out == two[0][f"{term}, left out"] and left_out["is_finite"] and left_out["error"] is None
        assert left_out["skipped"] == [0, 1, 1, 1, 1, 1]


@pytest.mark.one_leg
def test_zeros_stop_where_all_processes_have_them(nonfinite):
    """One process can have rows that teach nothing; stopped by it alone, the other would wait for ever."""
    two, _, _ = nonfinite
    for found in two:
        assert found["zero_in_the_last"]["error"] is None and found["zero_in_the_last"]["steps"] == 102
        assert "zero is exactly 0 in the last 50 steps, up to step 50:" in found["zero"]["error"]
        assert found["zero"]["steps"] == 49
