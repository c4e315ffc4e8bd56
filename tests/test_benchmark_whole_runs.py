"""The benchmark of whole runs, for real on tiny models: whether each variant is what its name says."""

import json
import subprocess
import sys

import pytest
import torch
from results_table import format_whole_runs
from safetensors.torch import load_file
from test_bad_input import files_in
from test_distributed import ROOT
from test_recipes import QUICK, glue_dir, teacher_dir  # noqa: F401

from hf_kd.results import read_results, write_results


pytestmark = pytest.mark.one_leg


EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


def benchmark(folder, *flags, check=True):
    command = [sys.executable, ROOT / "recipes" / "benchmark_whole_runs.py", "--output_dir", folder, *flags]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=check)


def write_complete_run(folder, variant, seed):
    """What of a run that is complete is read again."""
    folder.mkdir(parents=True)
    times = {"variant": variant, "seed": seed, "seconds": 12.5, "processor_seconds": 20.0}
    (folder / "wall_time.json").write_text(json.dumps(times))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"train_runtime": 8.5}]}))
    metrics = {
        "metrics": {"validation": {"accuracy": 0.5}},
        "main_metric": {"split": "validation", "name": "accuracy"},
    }
    write_results(folder / "results.json", [{"role": "student", "task": "sst2", "steps": 2, **metrics}])


def test_whole_runs(tmp_path, glue_dir, teacher_dir):  # noqa: F811
    """A variant would be another than its name says, or what is complete be run again and its time be lost."""
    flags = ["--task_name", "sst2", "--glue_dir", glue_dir, "--teacher_model_name_or_path", teacher_dir, *QUICK]
    flags += ["--hidden_loss_weight", "1", "--max_steps", "2", "--seeds", "1", "--variants"]
    folder = tmp_path / "runs"
    write_complete_run(folder / "online-seed1", "online", 1)
    before = files_in(folder)
    found = benchmark(folder, *flags, "finetune", "online", "cached+frozen")
    assert "online-seed1 is complete." in found.stdout and "finetune-seed1 is complete." not in found.stdout
    assert before.items() <= files_in(folder).items()
    rows = {row["variant"]: row for row in read_results(folder / "results.json")["whole_runs"]}
    assert list(rows) == ["build", "finetune", "online", "cached+frozen"]
    assert (rows["online"]["seconds"], rows["online"]["train_seconds"]) == (12.5, 8.5)
    for row in rows.values():
        assert row["seconds"] > row["train_seconds"] > 0 and row["processor_seconds"] > 0
        assert 0 <= row["metrics"]["validation"]["accuracy"] <= 1
    assert [row["steps"] for row in rows.values()] == [1, 2, 2, 2]
    terms = {
        variant: {
            name
            for log in json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
            for name in log
            if name.endswith("_loss") and not name.startswith(("eval", "train"))
        }
        for variant, name in {"finetune": "finetune-seed1", "cached+frozen": "cached+frozen-seed1"}.items()
    }
    assert terms == {"finetune": {"task_loss"}, "cached+frozen": {"task_loss", "logit_loss", "hidden_loss"}}
    embeddings = load_file(teacher_dir / "model.safetensors")[EMBEDDINGS]
    names = ("cached+frozen-seed1", "finetune-seed1")
    frozen, free = (load_file(folder / name / "model.safetensors")[EMBEDDINGS] for name in names)
    assert torch.equal(frozen, embeddings) and not torch.equal(free, embeddings)


def test_a_run_that_fails_ends_the_benchmark(tmp_path):
    """Its time would be noted as if it had trained, and the run never be repeated."""
    found = benchmark(tmp_path / "runs", "--task_name", "sst2", "--variants", "finetune", check=False)
    assert found.returncode != 0 and "there is no teacher to make a student of" in found.stderr
    assert not list(tmp_path.glob("runs/*/wall_time.json"))


def test_table_of_whole_runs():
    """A cost would be divided by that of another variant, or means and deviations be those of other rows."""

    def row(variant, seed, processor_seconds, accuracy):
        metric = {"split": "validation", "name": "accuracy"}
        metrics = {"validation": {"accuracy": accuracy}}
        row = {"variant": variant, "seed": seed, "train_seconds": 1.0, "seconds": 2.0}
        row |= {"processor_seconds": processor_seconds, "steps": 5}
        return {**row, "metrics": metrics, "main_metric": metric}

    rows = [row("build", None, 1, 0.1), row("finetune", 1, 100, 0.8), row("finetune", 2, 200, 0.9)]
    rows += [row("online", 1, 150, 0.8), row("online", 2, 340, 0.8)]
    _, _, *lines = format_whole_runs({"whole_runs": rows}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["build", "", "", "", "5", "1.00", "2.00", "1.00", ""]
    assert cells[1][:4] == ["finetune", "2", "accuracy", "85.00 ± 7.07"] and cells[1][-1] == "1.00"
    assert cells[2][3] == "80.00 ± 0.00" and float(cells[2][-1]) == pytest.approx(1.6, abs=0.005)


def test_rows_that_differ_by_seed_have_no_cache(tmp_path):
    """The cache of one seed's rows would be refused by the next seed's run, hours later."""
    found = benchmark(tmp_path / "runs", "--task_name", "sst2", "--max_train_samples", "100", check=False)
    assert found.returncode == 2 and "--max_train_samples draws other rows for each seed" in found.stderr
    assert not (tmp_path / "runs").exists()
