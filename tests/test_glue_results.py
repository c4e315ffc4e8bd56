"""`make results` on tiny models: what it runs, what it does not run again, and what its file says."""

import csv
import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_client import HubClient, run_main
from hub_server import HubServer, User
from test_distributed import ROOT
from test_recipes import NAMES, QUICK, RUN, run, save_model, sentence

from hf_kd.deploy.benchmark import default_variants
from hf_kd.glue import GLUE_TASKS, METRICS, TextTask, load_glue
from hf_kd.results import ROLES, describe_run, format_table, read_results
from hf_kd.significance import paired_bootstrap


pytestmark = pytest.mark.one_leg


CONFIGS = [path for path in sorted((ROOT / "recipes" / "configs").glob("*.yaml")) if not path.stem.startswith("demo")]
EMOTION = TextTask("emotion", ("text",), ("anger", "fear", "joy"), ("accuracy", "f1_macro"), "accuracy")


def write_glue(folder, task, num_rows=24):
    """Invented rows in the layout of the official archive."""
    rng = random.Random(0)
    header = list(task.archive_header or ("index", *(task.archive_text or task.text_columns), task.archive_label))
    for split in ("train", *(name.replace("validation", "dev") for name in task.validation_splits)):
        lines = [] if task.archive_header else [header]
        for index in range(num_rows):
            label = f"{rng.uniform(0, 5):.2f}" if task.is_regression else task.label_names[index % task.num_labels]
            is_named = task.name in ("mnli", "qnli", "rte")
            label = label if task.is_regression or is_named else str(task.label_names.index(label))
            # Something to learn where there are two labels: the words of one are rare in the other.
            texts = [
                " ".join(f"w{rng.randrange(29) + 29 * (index % 2 ^ (rng.random() < 0.3))}" for _ in range(5))
                for _ in header
            ]
            lines.append(
                [label if name == task.archive_label else text for name, text in zip(header, texts, strict=True)]
            )
        path = folder / task.folder / f"{split}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def write_emotion(folder, num_rows=24):
    rng = random.Random(0)
    folder.mkdir(parents=True)
    for name in ("train.txt", "val.txt"):
        lines = [f"{sentence(rng)};{rng.choice(EMOTION.label_names)}" for _ in range(num_rows)]
        lines[1] = 'he said "w1; w2", then;joy'  # a quote, and a separator within the text
        (folder / name).write_text("text;label_name\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return folder


# Recipe configurations, also those of tasks that nobody here has measured


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains(path, tmp_path, monkeypatch, tokenizer):
    """A configuration of a task that nobody here trains would be found broken by the first who does."""
    task = GLUE_TASKS.get(path.stem, EMOTION)
    if task is EMOTION:
        module = importlib.import_module("glue_results")
        files = module.write_emotion(tmp_path / "csv", write_emotion(tmp_path / "emotion"))
        data = ["--train_file", files["train"], "--validation_file", files["validation"]]
    else:
        data = ["--glue_dir", write_glue(tmp_path / "glue", task)]
    if task is EMOTION:
        texts = files["validation"].read_text(encoding="utf-8").splitlines()[1:]
        expected_labels = [EMOTION.label_names.index(line.rpartition(",")[2]) for line in texts]
    else:
        expected_labels = load_glue(task.name, tmp_path / "glue")[task.validation_splits[0]]["label"][:]
    names = {} if task.is_regression else {"id2label": dict(enumerate(task.label_names))}
    teacher = save_model(tmp_path / "teacher", tokenizer, seed=1, **(names or {"num_labels": 1}))
    flags = [path, *data, "--teacher_model_name_or_path", teacher, "--output_dir", tmp_path / "out", *QUICK]
    run(monkeypatch, "glue_distill", *flags)

    _, student = read_results(tmp_path / "out" / "results.json")["rows"]
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    weights = {name.removesuffix("_weight"): value for name, value in config.items() if name.endswith("_loss_weight")}
    assert (student["steps"], student["layers"], student["weights"]) == (4, 2, weights)
    # What is compared with the baseline must be what the table shows.
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert (found["split"], list(found["predictions"])) == (task.validation_splits[0], ["student"])
    labels, predictions = np.array(found["labels"]), np.array(found["predictions"]["student"])
    assert found["labels"] == pytest.approx(expected_labels)  # grouped by length, batches come in another order
    for name in task.metric_names:
        assert METRICS[name](labels, predictions) == pytest.approx(student["metrics"][found["split"]][name])


def test_all_of_glue_has_a_config():
    """Whoever has the data should need no settings of their own."""
    assert {path.stem for path in CONFIGS} == {*GLUE_TASKS, "emotion"}


def test_emotion_becomes_own_files(tmp_path):
    """A text that is cut at its own semicolon would get the rest of it as a label."""
    module = importlib.import_module("glue_results")
    files = module.write_emotion(tmp_path / "csv", write_emotion(tmp_path / "emotion"))
    with files["validation"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["text", "label"] and len(rows) == 25
    assert rows[2] == ['he said "w1; w2", then', "joy"]


# The whole table


class Recipes:
    """Runs the recipes that `make results` starts in this process, and keeps their names."""

    def __init__(self):
        self.started = []

    def __call__(self, *words):
        words = [str(word) for word in words]
        first = next(index for index, word in enumerate(words) if word.endswith(".py"))
        self.started.append((Path(words[first]).stem, Path(words[words.index("--output_dir") + 1]).name))
        with pytest.MonkeyPatch.context() as patch:
            run(patch, Path(words[first]).stem, *words[first + 1 :])


def few_variants(*folders):
    """Each is a process, and those of torch take seconds to start."""
    return [found for found in default_variants(*folders) if found.runtime != "torch" or found.role == "teacher"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer):
    """Two seeds of SST-2, from the encoder to the cards."""
    folder = tmp_path_factory.mktemp("results")
    write_glue(folder / "glue", GLUE_TASKS["sst2"], num_rows=30)
    save_model(folder / "encoder", tokenizer, seed=1, **NAMES)
    flags = ["--tasks", "sst2", "--seeds", 1, 2, "--glue_dir", folder / "glue", "--encoder", folder / "encoder"]
    flags += ["--work_dir", folder / "work", "--results_file", folder / "results" / "glue.json"]
    flags += ["--cards_dir", folder / "cards", "--hub_namespace", "someone", *QUICK, "--learning_rate", 0.003]
    flags += ["--benchmark_lengths", 16, "--benchmark_rounds", 1, "--benchmark_seconds", 0.01]
    flags += ["--benchmark_threads", 1]
    flags[flags.index("no")] = "steps"  # so that there are checkpoints
    flags[flags.index("--max_steps") + 1] = 12
    recipes, module = Recipes(), importlib.import_module("glue_results")

    def call(*more, run_recipes=recipes):
        recipes.started.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "run", run_recipes)
            patch.setattr("export_onnx.default_variants", few_variants)
            run(patch, "glue_results", *flags, *more)
        return list(recipes.started)

    return folder, call, call()


def test_what_is_run(finished):
    """A teacher for each seed would be another spread; each seed has a student, its baseline and its int8 file."""
    folder, _, started = finished
    assert started == [
        ("glue_finetune", "teacher"),
        *(("glue_distill", "student-seed1"), ("export_onnx", "student-seed1")),
        *(("glue_distill", "student-seed2"), ("export_onnx", "student-seed2")),
    ]
    work = folder / "work" / "sst2"
    assert not list(work.rglob("checkpoint-*"))  # 12 bytes for each weight of each run
    results = read_results(work / "student-seed2" / "results.json")
    command = results["run"]["command"]
    assert "--benchmark_lengths 16" in command and "--max_metric_drop 0.0833" in command  # two rows of 30
    assert {row["role"] for row in results["benchmark"]} == {"student"}


def test_the_file_holds_all_seeds_and_roles(finished):
    """A row of one seed taken for another's, or int8 figures of the float32 file."""
    folder, _, _ = finished
    results = read_results(folder / "results" / "glue.json")
    rows = results["rows"]
    assert [(row["role"], row["seed"]) for row in rows] == [
        ("teacher", None),
        *((role, seed) for role in ("baseline", "student", "int8") for seed in (1, 2)),
    ]
    for row in rows[3:]:
        own = read_results(folder / "work" / "sst2" / f"student-seed{row['seed']}" / "results.json")
        if row["role"] == "student":
            assert [r for r in own["rows"] if (r["role"], r["seed"]) == ("student", row["seed"])] == [row]
            assert row["weights"]["attention_loss"] == 1.0 and row["steps"] == 12
            assert 0 <= row["metrics"]["validation"]["teacher_agreement"] <= 1
        else:
            (measured,) = (r for r in own["benchmark"] if r["precision"] == "int8")
            assert (row["metrics"], row["size_bytes"]) == (measured["metrics"], measured["size_bytes"])
    assert {row["variant"] for row in results["benchmark"]} >= {"teacher torch fp32", "student ONNX int8"}
    assert {row["task"] for row in (*rows, *results["benchmark"])} == {"sst2"}
    assert list(results["runs"]) == ["sst2/teacher", "sst2/student-seed1", "sst2/student-seed2"]
    assert "glue_distill.py sst2.yaml" in results["runs"]["sst2/student-seed2"]["command"]
    assert str(folder) not in (folder / "results" / "glue.json").read_text()
    assert (folder / "results" / "glue.png").read_bytes()[:4] == b"\x89PNG"


def test_the_comparison_is_of_the_rows_in_the_table(finished):
    """An interval around another difference than that of the two means beside it."""
    folder, _, _ = finished
    results = read_results(folder / "results" / "glue.json")
    (found,) = results["comparisons"]
    means = {
        role: np.mean([row["metrics"]["validation"]["accuracy"] for row in results["rows"] if row["role"] == role])
        for role in ROLES
    }
    assert found["difference"] == pytest.approx(means["student"] - means["baseline"])
    assert {name: found[name] for name in ("task", "metric", "split", "seeds", "rows", "confidence")} == {
        **{"task": "sst2", "metric": "accuracy", "split": "validation"},
        **{"seeds": [1, 2], "rows": 30, "confidence": 0.95},
    }
    files = [folder / "work" / "sst2" / f"student-seed{seed}" / "predictions.json" for seed in (1, 2)]
    seeds = [json.loads(path.read_text()) for path in files]
    by_role = [[one["predictions"][role] for one in seeds] for role in ("student", "baseline")]
    expected = paired_bootstrap(GLUE_TASKS["sst2"], seeds[0]["labels"], *by_role)
    assert {name: found[name] for name in expected} == expected


def test_the_card_tells_of_all_seeds(finished):
    """The card of one seed would show its luck."""
    folder, _, _ = finished
    card = (folder / "cards" / "sst2.md").read_text(encoding="utf-8")
    own = (folder / "work" / "sst2" / "student-seed1" / "README.md").read_text(encoding="utf-8")
    assert card.replace("](sst2.png)", "](pareto.png)") == own
    rows = read_results(folder / "results" / "glue.json")["rows"]
    means = [100 * row["metrics"]["validation"]["accuracy"] for row in rows if row["role"] == "student"]
    assert f"{np.mean(means):.2f} ± {np.std(means, ddof=1):.2f}" in card
    assert "someone/sst2-student" in card and "paired bootstrap" in card and str(folder) not in card


def test_the_card_has_its_picture_beside_it(finished, tmp_path):
    """A reader would see a broken image, that of another task's student, or that of an export which is gone."""
    from PIL import Image, ImageChops

    folder, _, _ = finished
    student, copied = folder / "work" / "sst2" / "student-seed1", folder / "cards" / "sst2.png"
    card = (folder / "cards" / "sst2.md").read_text(encoding="utf-8")
    assert card.count("](sst2.png)") == 1 and "pareto.png" not in card
    assert sorted(path.name for path in (folder / "cards").iterdir()) == ["sst2.md", "sst2.png"]
    with Image.open(student / "pareto.png") as drawn, Image.open(copied) as shown:
        difference = ImageChops.difference(drawn.convert("L"), shown.convert("L"))
        assert drawn.size == shown.size and difference.getextrema()[1] < 40
    assert copied.stat().st_size < 60_000 and copied.stat().st_size < (student / "pareto.png").stat().st_size

    module = importlib.import_module("glue_results")
    (tmp_path / "README.md").write_text("# Without a picture\n", encoding="utf-8")
    (tmp_path / "rte.png").write_bytes(b"of the export before")
    module.copy_card(tmp_path / "README.md", tmp_path / "rte.md")
    assert (tmp_path / "rte.md").read_text(encoding="utf-8") == "# Without a picture\n"
    assert not (tmp_path / "rte.png").exists()


def test_a_second_call_runs_nothing(finished):
    """A table that was stopped after a day would begin again, or count the merged rows of the first seed twice."""
    folder, call, _ = finished
    before = read_results(folder / "results" / "glue.json")
    assert call() == []
    after = read_results(folder / "results" / "glue.json")
    assert {name: value for name, value in after.items() if name != "run"} == {
        name: value for name, value in before.items() if name != "run"
    }


def test_runs_of_other_settings_are_not_taken_for_these(finished):
    """A few steps of a trial would stand in the table as the real training."""
    folder, call, _ = finished
    with pytest.raises(SystemExit, match=r"(?s)teacher holds the run of\n.*--max_steps 12.*Move the folder away"):
        call("--max_steps", 5)
    assert call("--benchmark_seconds", 0.02, "--only_aggregate") == []


def test_aggregating_alone(finished, capsys):
    """The table is made anew on a machine that has neither the data nor the time; other tasks stay in its file."""
    folder, call, _ = finished
    path = folder / "results" / "glue.json"
    before = read_results(path)
    other = {**before, "rows": [{**before["rows"][0], "task": "mrpc"}], "benchmark": [], "comparisons": [], "runs": {}}
    path.write_text(json.dumps(other))
    assert call("--only_aggregate", "--glue_dir", folder / "nowhere") == []
    after = read_results(path)
    assert after["rows"] == [*before["rows"], *other["rows"]]
    assert after["comparisons"] == before["comparisons"] and after["runs"] == before["runs"]
    assert "| sst2 | student distilled + int8 | accuracy | 2 |" in capsys.readouterr().out
    path.write_text(json.dumps(before))


def test_a_step_that_fails_ends_the_call(finished, tmp_path, capfd):
    """The steps after it would be made of what it left; a real process under the launcher, as users have it."""
    _, call, _ = finished
    module = importlib.import_module("glue_results")
    with pytest.raises(SystemExit, match="glue_finetune.py left .* incomplete"):
        call("--work_dir", tmp_path / "work", "--encoder", tmp_path / "nowhere", run_recipes=module.run)
    output, errors = capfd.readouterr()
    assert "python -m accelerate.commands.launch --config_file" in output and "glue_distill.py" not in output
    assert str(tmp_path / "nowhere") in errors


def test_a_table_without_int8(tmp_path, monkeypatch, finished):
    """No int8 file that keeps the metric is a result, and must not cost the other rows."""
    module = importlib.import_module("glue_results")
    folder, _, _ = finished
    args = [("--tasks", "sst2"), ("--seeds", "1", "2"), ("--work_dir", str(folder / "work"))]
    monkeypatch.setattr(sys, "argv", ["glue_results.py", *(word for pair in args for word in pair)])
    parsed, _ = module.parse_flags()
    failed = {"quantization": {"failed": True}}

    def without_int8(path):
        results = read_results(path / "results.json")
        results.pop("benchmark", None)
        return {**results, "export": failed}

    monkeypatch.setattr(module, "results_of", without_int8)
    found = module.collect("sst2", parsed)
    assert [row["role"] for row in found["rows"]] == ["teacher", "baseline", "baseline", "student", "student"]
    assert found["benchmark"] == [] and len(found["comparisons"]) == 1


def test_flags_go_to_their_recipes(monkeypatch):
    """The length of the training data in place of that of all would measure other rows than were trained on."""
    module = importlib.import_module("glue_results")
    words = [
        "--seeds",
        "1",
        "--max_seq_length=32",
        "--max_steps",
        "4",
        "--benchmark_lengths",
        "16",
        "64",
        "--no_optimize",
    ]
    monkeypatch.setattr(sys, "argv", ["glue_results.py", *words, "--task_loss_weight", "0.2"])
    args, flags = module.parse_flags()
    assert flags == {
        "data": ["--max_seq_length=32"],
        "export": ["--benchmark_lengths", "16", "64", "--no_optimize"],
        "training": ["--max_steps", "4"],
        "distill": ["--task_loss_weight", "0.2"],
    }
    assert args.seeds == [1] and set(args.tasks) == {"sst2", "mrpc", "rte", "stsb", "wnli", "emotion"}


def test_a_command_is_known_again_however_its_paths_are_written(monkeypatch):
    """A training of a day would be refused as another one's, since its record names no folder and no token."""
    module = importlib.import_module("glue_results")
    words = ["recipes/glue_distill.py", "--glue_dir=/data/glue", "--hub_token", "hf_" + "a" * 20, "--seed=1"]
    monkeypatch.setattr(sys, "argv", words)
    recorded = describe_run()["command"]
    assert module.is_same_command(recorded, words)
    assert module.is_same_command(recorded, [*words[:1], "--glue_dir=other/glue", *words[2:]])
    assert not module.is_same_command(recorded, [*words[:-1], "--seed=2"])


def test_students_of_another_teacher_are_not_taken_for_these(tmp_path):
    """A teacher that is trained again would stand in the table beside students of the one before."""
    module = importlib.import_module("glue_results")
    teacher, student = tmp_path / "teacher", tmp_path / "student-seed1"
    teacher.mkdir()
    (teacher / "model.safetensors").write_bytes(b"one")
    module.check_teacher(student, teacher)
    module.check_teacher(student, teacher)
    (teacher / "model.safetensors").write_bytes(b"two")
    with pytest.raises(SystemExit, match="student-seed1 was distilled from another teacher.*Move the student's"):
        module.check_teacher(student, teacher)


def test_a_student_whose_making_was_not_written_down_is_not_complete(finished):
    """Its card could never say how it was made, and nothing would run again."""
    module = importlib.import_module("glue_results")
    folder = finished[0] / "work" / "sst2" / "student-seed2"
    results = read_results(folder / "results.json")
    assert results["distillation"] and module.is_trained("glue_distill.py", folder, results)
    without = {name: value for name, value in results.items() if name != "distillation"}
    assert not module.is_trained("glue_distill.py", folder, without)


def test_a_description_that_fails_costs_no_rows_and_no_second_training(tmp_path, monkeypatch, tokenizer):
    """Each call of the table would train the student again, since it is never complete."""
    write_glue(tmp_path / "glue", GLUE_TASKS["sst2"])
    teacher = save_model(tmp_path / "teacher", tokenizer, seed=1, **NAMES)

    def fail(trainer):
        raise RuntimeError("cannot be described")

    monkeypatch.setattr("glue_distill.describe_distillation", fail)
    flags = ["--task_name", "sst2", "--glue_dir", tmp_path / "glue", "--teacher_model_name_or_path", teacher]
    run(monkeypatch, "glue_distill", *flags, "--run_baseline", "--output_dir", tmp_path / "out", *QUICK)
    module = importlib.import_module("glue_results")
    assert module.is_trained("glue_distill.py", tmp_path / "out", module.results_of(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").is_file()


def test_a_teacher_is_published_without_what_is_private(tmp_path, tokenizer):
    """The state names the user's folders, and a first push has no metrics in its card."""
    write_glue(tmp_path / "glue", GLUE_TASKS["sst2"])
    base, token = save_model(tmp_path / "base", tokenizer, **NAMES), "hf_" + "m" * 34
    flags = ["--task_name", "sst2", "--glue_dir", tmp_path / "glue", "--model_name_or_path", base, *QUICK]
    flags += ["--output_dir", tmp_path / "out", "--push_to_hub", "--hub_model_id", "me/teacher"]
    with HubServer({token: User("me")}) as server, HubClient(server.endpoint, tmp_path / "home") as client:
        client(run_main, "glue_finetune", *map(str, flags), login=token)
        repo = server.repos["me/teacher"]
        assert len(repo.history()) == 1
        files = repo.files()
    assert (tmp_path / "out" / "trainer_state.json").is_file()
    assert {"config.json", "model.safetensors", "README.md", "results.json", "tokenizer.json"} <= set(files)
    assert not {"training_args.bin", "trainer_state.json"} & set(files)
    assert "nyu-mll/glue" in files["README.md"].decode() and "# teacher" in files["README.md"].decode()


# The tables


def test_table_with_differences():
    """The difference in the line of the baseline or of another task would be read as its own."""
    metric = {"main_metric": {"split": "validation", "name": "accuracy"}, "parameters": 1e6, "seed": 1}
    rows = [
        {"task": task, "role": role, "metrics": {"validation": {"accuracy": value}}, **metric}
        for task in ("sst2", "rte")
        for role, value in zip(ROLES, (0.9, 0.8, 0.85, 0.84), strict=True)
    ]
    comparison = {"task": "sst2", "difference": 0.05, "low": -0.0012, "high": 0.1, "confidence": 0.9}
    lines = format_table(rows, [comparison]).splitlines()
    assert lines[0].startswith("| task | model | metric | seeds | value | difference [90 %] | parameters |")
    assert {line.count("|") for line in lines} == {12}
    assert [line.split(" | ")[5] for line in lines[2:]] == ["", "", "+5.00 [-0.12, +10.00]", *[""] * 5]
    assert lines[5].startswith("| sst2 | student distilled + int8 | accuracy | 1 | 84.00 |  | 1.0M | 93.3% |")
    assert "difference" not in format_table(rows)


def test_inference_of_several_tasks_in_one_file(tmp_path, monkeypatch, capsys):
    """A speed-up over the teacher of another task."""

    def row(task, role, milliseconds):
        cell = {"threads": 1, "batch_size": 1, "length": 16, "p50_ms": milliseconds, "p95_ms": milliseconds}
        facts = {"task": task, "variant": role, "role": role, "size_bytes": 1e6, "main_metric": None, "metrics": None}
        return {**facts, "latency": [cell], "end_to_end": []}

    benchmark = [row("sst2", "teacher", 8.0), row("sst2", "student", 4.0)]
    benchmark += [row("rte", "teacher", 9.0), row("rte", "student", 3.0)]
    (tmp_path / "glue.json").write_text(json.dumps({"run": RUN, "rows": [], "benchmark": benchmark}))
    run(monkeypatch, "results_table", tmp_path / "glue.json")
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [(line[0], line[1], line[6]) for line in lines[2:]] == [
        *(("| sst2", "teacher", "1.0x"), ("| sst2", "student", "2.0x")),
        *(("| rte", "teacher", "1.0x"), ("| rte", "student", "3.0x")),
    ]


def test_the_plot_has_a_bar_for_int8(tmp_path, monkeypatch):
    """Values below the axis, as of a task that nobody learns, must not vanish from the picture."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    module = importlib.import_module("results_table")
    metric = {"main_metric": {"split": "validation", "name": "accuracy"}, "seed": 1}
    rows = [
        {"task": "wnli", "role": role, "metrics": {"validation": {"accuracy": value}}, **metric}
        for role, value in zip(ROLES, (0.9, 0.8, 0.3, 0.2), strict=True)
    ]
    axes, subplots = [], matplotlib.pyplot.subplots

    def keep(**kwargs):
        figure, made = subplots(**kwargs)
        axes.append(made)
        return figure, made

    monkeypatch.setattr(matplotlib.pyplot, "subplots", keep)
    module.plot(rows, tmp_path / "plot.png")
    bars = [(bar.get_x(), bar.get_height()) for container in axes[0].containers[1::2] for bar in container]
    assert [height for _, height in bars] == pytest.approx([90, 80, 30, 20])
    assert len({x for x, _ in bars}) == 4 and axes[0].get_ylim()[0] < 20
