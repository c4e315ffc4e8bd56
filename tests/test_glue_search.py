"""The search for a student within a budget: what it draws, what it goes on with, and what it chooses."""

import os
import signal
import subprocess
import sys
import time

import optuna
import pytest
import yaml
from datasets import Dataset, DatasetDict
from glue_search import split_rows
from safetensors.torch import load_file
from search_choice import choose, front
from search_space import SearchArguments
from search_study import add_other_precisions, num_students, run_trials
from test_recipes import NAMES, QUICK, ROOT, run, save_model, write_rows

from hf_kd.glue import GLUE_TASKS
from hf_kd.results import read_results


pytestmark = pytest.mark.one_leg


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A teacher that knows its labels' names, and rows of SST-2's layout."""
    folder = tmp_path_factory.mktemp("search")
    save_model(folder / "teacher", tokenizer, seed=1, **NAMES)
    write_rows(folder / "glue" / "SST-2" / "train.tsv", ["sentence", "label"], seed=0)
    write_rows(folder / "glue" / "SST-2" / "dev.tsv", ["sentence", "label"], num_rows=40, seed=1)
    return folder


def flags(folder, output="out"):
    found = ["--task_name", "sst2", "--glue_dir", folder / "glue", "--output_dir", folder / output]
    found += ["--teacher_model_name_or_path", folder / "teacher", "--benchmark_rounds", 1]
    found += ["--benchmark_seconds", 0.01, "--search_num_layers", 1, "--num_trials", 2, *QUICK]
    return list(map(str, found))


def trials_of(out):
    storage = optuna.storages.RDBStorage(f"sqlite:///{(out / 'study.db').resolve()}")
    return optuna.load_study(storage=storage, study_name="glue_search").trials


@pytest.fixture(scope="module")
def searched(folder):
    """A search that was killed in its second student, and the one that went on with it."""
    out = folder / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("w") as log:
        command = [sys.executable, ROOT / "recipes" / "glue_search.py", *flags(folder)]
        killed = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while not (out / "students" / "1").is_dir():  # which its Trainer makes
        assert killed.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (out / "results.json").exists()
    (out / "students" / "7").mkdir()  # as of a kill while students were deleted
    first = trials_of(out)[:2]
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, "glue_search", *flags(folder), "--max_latency_ms", 1000)
    return out, first


def test_goes_on_after_a_kill(searched):
    """A search of hours that starts anew, skips the student it was at, or draws another, is not the one asked for."""
    out, first = searched
    trials = read_results(out / "results.json")["search"]["trials"]
    states = [(trial["student"], trial["state"]) for trial in trials]
    assert states == [(0, "COMPLETE"), (0, "COMPLETE"), (1, "FAIL"), (1, "COMPLETE"), (1, "COMPLETE")]
    assert trials[2]["params"] == trials[3]["params"] and trials[2]["params"] != trials[0]["params"]
    for fp32, int8 in (trials[:2], trials[3:]):
        assert {fp32["params"]["precision"], int8["params"]["precision"]} == {"fp32", "int8"}
        assert {**fp32["params"], "precision": ""} == {**int8["params"], "precision": ""}
    assert [trial.state.name for trial in first] == ["COMPLETE", "COMPLETE"]
    assert trials_of(out)[:2] == first  # when they began and ended, and what was measured


def test_latency_is_measured_once_for_a_shape(searched):
    """Two students of one shape that differ by the noise of a clock would make a front of luck."""
    out, _ = searched
    search = read_results(out / "results.json")["search"]
    latencies = {
        (trial["params"]["precision"], trial["latency_ms"]) for trial in search["trials"] if "metric" in trial
    }
    names = {f"student: 1 layers of width 32, {precision}": p50 for precision, p50 in latencies}
    measured = {name: cell["p50_ms"] for name, cell in search["latencies"].items() if name.startswith("student")}
    assert len(latencies) == 2 and measured == names
    assert search["rows"]["chosen_on"] == "one half of the validation split (20 rows)"


def test_leaves_no_path_and_only_students_that_none_beats(searched, folder):
    """A path of the user's machine in results that are published; a disk full of students that nobody wants."""
    out, _ = searched
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder) not in (out / "results.json").read_text()
    search = read_results(out / "results.json")["search"]
    best = front([trial for trial in search["trials"] if "metric" in trial])
    assert {path.name for path in (out / "students").iterdir()} == {str(point["student"]) for point in best}


def test_the_yaml_trains_the_chosen_student_again(searched, folder, monkeypatch):
    """A YAML that lacks one argument of the search trains another student than the one that was measured."""
    out, _ = searched
    chosen = read_results(out / "results.json")["search"]["chosen"]
    config = yaml.safe_load((out / "chosen.yaml").read_text())
    assert config["export_onnx"] is True and config["student_num_layers"] == 1
    teacher = ["--teacher_model_name_or_path", folder / "teacher", "--output_dir", folder / "again"]
    run(monkeypatch, "glue_distill", out / "chosen.yaml", *teacher, "--report_to", "none", "--save_strategy", "no")
    again = load_file(folder / "again" / "model.safetensors")
    searched_weights = load_file(out / "students" / str(chosen["student"]) / "model.safetensors")
    assert again.keys() == searched_weights.keys()
    assert all(again[name].equal(tensor) for name, tensor in searched_weights.items())
    assert (folder / "again" / "onnx" / "model_quantized.onnx").stat().st_size > 0


def test_other_targets_choose_among_the_students_that_are_there(searched, folder, monkeypatch, capsys):
    """Who asks for another budget must not train again; a miss must be loud, and its YAML there."""
    out, _ = searched
    before = len(read_results(out / "results.json")["search"]["trials"])
    targets = ["--target_retention", "1.9", "--max_latency_ms", "1000", "--num_trials", "1"]
    run(monkeypatch, "glue_search", *flags(folder), *targets)
    assert "NO STUDENT keeps 190.0% of the teacher and answers within 1000 ms." in capsys.readouterr().out
    assert "NO STUDENT keeps" in (out / "chosen.yaml").read_text()
    assert len(read_results(out / "results.json")["search"]["trials"]) == before


def test_refuses_another_search_in_the_same_folder(searched, folder, monkeypatch, tokenizer):
    """Students of other ranges or of another teacher in one study would be compared as if they were alike."""
    with pytest.raises(ValueError, match=r"search_temperature was \[1.0, 8.0\], and is \[1.0, 4.0\].*may change"):
        run(monkeypatch, "glue_search", *flags(folder), "--search_temperature", 1, 4)
    with pytest.raises(ValueError, match="max_steps was 4, and is 5"):
        run(monkeypatch, "glue_search", *flags(folder), "--max_steps", 5)
    other = save_model(folder / "other", tokenizer, seed=5, **NAMES)
    with pytest.raises(ValueError, match="teacher's weights was"):
        run(monkeypatch, "glue_search", *flags(folder), "--teacher_model_name_or_path", other)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--push_to_hub"], "push_to_hub would publish every student.*chosen.yaml --push_to_hub"),
        (["--learning_rate", "1e-4"], "learning_rate=0.0001 is what is searched.*--search_learning_rate"),
        (["--student_num_layers", "2"], "student_num_layers=2 is what is searched.*--search_num_layers"),
        (["--hidden_loss_weight", "1"], "hidden_loss_weight=1.0 is what is searched.*--search_weights"),
        (["--search_num_layers", "9"], "search_num_layers=9 .*between 1 and the teacher's 4"),
        (["--search_hidden_sizes", "10"], "width 10 .*does not divide hidden_size=10"),
        (["--student_num_attention_heads", "2", "--search_hidden_sizes", "16"], "search_terms=.*attention.*heads"),
        (["--search_learning_rate", "1e-3", "1e-4"], "search_learning_rate=.* the lowest and the highest"),
        (["--search_terms", "logit"], "search_terms=.*choose from logits, hidden"),
        (["--target_retention", "97"], "97 % is --target_retention 0.97"),
        (["--max_latency_ms", "0"], "max_latency_ms=0.0 must be above 0"),
        (["--task_loss_weight", "0"], "task_loss_weight=0 leaves nothing"),
        (["--latency_length", "64"], "latency_length=64 must be between 3 and max_seq_length=32"),
        (["--search_split", "holdout", "--search_holdout", "0.001"], "0.001 of 24 rows leaves one part"),
    ],
)
def test_bad_input_fails_before_the_first_student(folder, monkeypatch, given, message):
    """An error after the first of twenty students has cost an hour."""
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, "glue_search", *flags(folder, "bad"), *given)
    assert not (folder / "bad").exists()


def test_rows_that_choose_are_not_those_that_train_or_report():
    """A student chosen on the rows it is reported on, or trained on, looks better than it is."""

    def rows(start, count):
        return Dataset.from_dict(
            {"sentence": [f"s{i}" for i in range(start, start + count)], "label": [0, 1] * (count // 2)}
        )

    def split(data, **changes):
        found, described = split_rows(SearchArguments(**changes), data, GLUE_TASKS["sst2"], seed=0)
        return {name: set(part["sentence"]) for name, part in found.items()}, described

    data = DatasetDict(train=rows(0, 40), validation=rows(100, 20))
    halves, _ = split(data)
    assert halves["search"] | halves["report"] == set(data["validation"]["sentence"])
    assert len(halves["search"]) == 10 and not halves["search"] & halves["report"]
    held_out, described = split(data, search_split="holdout", search_holdout=0.25)
    assert held_out["search"] | held_out["train"] == set(data["train"]["sentence"])
    assert len(held_out["search"]) == 10 and held_out["report"] == set(data["validation"]["sentence"])
    assert described["chosen_on"] == "25% of the labelled training rows, held out (10 rows)"
    _, described = split(data, search_split="validation")
    assert "the same rows" in described["reported_on"]
    tested, _ = split(DatasetDict(**data, test=rows(200, 10)))
    assert tested["report"] == {f"s{i}" for i in range(200, 210)} and len(tested["search"]) == 20


def point(student, metric, latency_ms, size_bytes, precision="fp32"):
    arguments = {"student_num_layers": 2}
    return {
        **{"student": student, "precision": precision, "arguments": arguments},
        **{"metric": metric, "latency_ms": latency_ms, "size_bytes": size_bytes},
    }


BEATEN = point(4, 0.86, 1.5, 20)  # as small as student 2 and worse
POINTS = [BEATEN, point(0, 0.90, 8, 60), point(1, 0.88, 2.5, 50), point(2, 0.87, 1.5, 20), point(3, 0.80, 1.0, 15)]


@pytest.mark.parametrize(
    ("targets", "student"),
    [
        ({"target_retention": 0.95, "max_latency_ms": 2}, 2),
        ({"target_retention": 0.95}, 2),
        ({"target_retention": 0.97}, 1),
        ({"max_latency_ms": 1.2}, 3),
        ({"max_latency_ms": 3}, 1),
        ({}, 0),
    ],
)
def test_chooses_the_smallest_that_keeps_enough_or_the_best(targets, student):
    """The choice is what people run the search for."""
    chosen, message = choose(POINTS, 0.90, **targets)
    assert chosen["student"] == student and "NO STUDENT" not in message
    assert chosen in front(POINTS) and BEATEN not in front(POINTS)


def test_says_what_comes_closest():
    """Told only that nothing fits, people do not know which of the two to give up, nor by how much."""
    chosen, message = choose(POINTS, 0.90, target_retention=0.97, max_latency_ms=2)
    assert chosen["student"] == 2 and chosen in front(POINTS)
    assert message == (
        "NO STUDENT keeps 97.0% of the teacher and answers within 2 ms. student 2 (2 layers, fp32) comes closest: it "
        "keeps 96.7%, 0.33 % of the teacher too little."
    )
    chosen, message = choose(POINTS, 0.90, max_latency_ms=0.5)
    assert chosen["student"] == 3 and message.endswith("it takes 1.00 ms, 0.50 ms more than 0.5.")


def test_the_other_precision_is_added_after_a_kill_between_the_two():
    """Killed after the first of a student's two points was noted, the search would never have the second."""
    study = optuna.create_study(directions=["maximize", "minimize"])
    trial = study.ask()
    trial.suggest_categorical("precision", ["fp32", "int8"])
    trial.set_user_attr("student", 0)
    trial.set_user_attr("seconds", 1.0)
    trial.set_user_attr("measured", {"fp32": point(0, 0.9, 2, 4), "int8": point(0, 0.8, 1, 1)})
    study.tell(trial, [0.9, 2])
    for _ in range(2):
        add_other_precisions(study)
        assert len(study.trials) == 2 and num_students(study) == 1
    assert sorted(trial.params["precision"] for trial in study.trials) == ["fp32", "int8"]


class OneShape:
    """A space of one learning rate, for trials that train nothing."""

    depths, widths = (2,), (32,)

    def center(self, depth, width):
        return {"learning_rate": 1e-3, "precision": "fp32"}

    def draw(self, trial):
        trial.suggest_categorical("precision", ["fp32", "int8"])
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)}

    def arguments(self, drawn):
        return {"student_num_layers": 2, "learning_rate": drawn["learning_rate"]}


def test_an_error_is_tried_again_and_does_not_take_a_student_away(tmp_path, capsys):
    """A full disk would use up the students that were asked for, and the middle of the ranges never be tried."""
    study = optuna.create_study(directions=["maximize", "minimize"])
    tried = []

    def call(*outcomes, num_trials=3):
        coming = iter(outcomes)

        def train_student(arguments, folder):
            outcome = next(coming)
            tried.append((int(folder.name), arguments["learning_rate"], outcome))
            if outcome == "error":
                raise OSError("no space left on device")
            return None if outcome == "diverged" else {"fp32": point(0, 0.9, 2, 4), "int8": point(0, 0.8, 1, 1)}

        run_trials(study, OneShape(), SearchArguments(num_trials=num_trials), 0, tmp_path, train_student)

    with pytest.raises(OSError):
        call("error")
    assert num_students(study) == 0 and "tries it once more" in capsys.readouterr().out
    with pytest.raises(OSError):
        call("good", "error")
    with pytest.raises(OSError):
        call("error")
    assert num_students(study) == 2 and "goes on with another" in capsys.readouterr().out
    call("diverged")
    assert [number for number, _, _ in tried] == [0, 0, 1, 1, 2]
    assert tried[0][1] == tried[1][1] == 1e-3 and tried[2][1] == tried[3][1] != 1e-3
    call()
    assert num_students(study) == 3
