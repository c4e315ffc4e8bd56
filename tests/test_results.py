"""What a run measured: written whole, averaged over seeds, and silent about the user's folders and tokens."""

import json
import sys

import pytest

from hf_kd.files import write_whole
from hf_kd.results import describe_run, format_table, read_results, write_results


def make_row(role, value, seed=0, task="sst2", parameters=66_955_010, **more):
    return {
        "role": role,
        "task": task,
        "seed": seed,
        "metrics": {"validation": {"accuracy": value}},
        "main_metric": {"split": "validation", "name": "accuracy"},
        "parameters": parameters,
        **more,
    }


def test_rows_are_read_back_as_written(tmp_path):
    """A number would change between the run and the table made from its file."""
    rows = [make_row("teacher", 0.9243119266055045), make_row("student", 1 / 3, seed=7, learning_rate=5e-5)]
    path = tmp_path / "results.json"
    write_results(path, rows)
    results = read_results(path)
    assert results["rows"] == rows
    assert sorted(results) == ["rows", "run"]
    assert sorted(results["run"]) == ["command", "commit", "hardware", "processes", "threads_per_process", "versions"]
    assert results["run"]["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """Hours of results would be lost to one value that JSON does not know."""
    path = tmp_path / "results.json"
    write_results(path, [make_row("student", 0.5)])
    before = path.read_bytes()
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        write_results(path, [make_row("student", 0.75), make_row("student", {0.5}, seed=1)])
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_table_shows_mean_and_sample_deviation_over_seeds():
    """The population's deviation of 1.63 instead of 2.00 would make every result look steadier than it is."""
    rows = [make_row("student", value, seed) for seed, value in enumerate([0.80, 0.82, 0.84])]
    rows.append(make_row("baseline", 0.75, labeled_rows=100, unlabeled_rows=0, steps=12))
    rows.append(make_row("teacher", 0.90, parameters=109_483_778))
    assert format_table(rows).splitlines() == [
        "| task | model | metric | seeds | value | parameters | retained | labelled rows | unlabelled rows | steps |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| sst2 | teacher | accuracy | 1 | 90.00 | 109.5M | 100.0% |  |  |  |",
        "| sst2 | student without distillation | accuracy | 1 | 75.00 | 67.0M | 83.3% | 100 | 0 | 12 |",
        "| sst2 | student distilled | accuracy | 3 | 82.00 ± 2.00 | 67.0M | 91.1% |  |  |  |",
    ]


def test_tasks_are_kept_apart():
    """One task's share would be taken of another task's teacher, or its seeds averaged with those of another."""
    rows = [
        make_row("teacher", 0.8, task="rte"),
        make_row("student", 0.6, task="rte"),
        make_row("teacher", 0.5, task="cola"),
        make_row("student", 0.4, task="cola"),
        make_row("student", 0.7, task="mrpc"),
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in format_table(rows).splitlines()[2:]]
    assert [(row[0], row[1], row[3], row[4], row[6]) for row in cells] == [
        ("rte", "teacher", "1", "80.00", "100.0%"),
        ("rte", "student distilled", "1", "60.00", "75.0%"),
        ("cola", "teacher", "1", "50.00", "100.0%"),
        ("cola", "student distilled", "1", "40.00", "80.0%"),
        ("mrpc", "student distilled", "1", "70.00", ""),
    ]


def test_a_seed_counts_once():
    """A repeated run would make the spread smaller without one more seed."""
    rows = [make_row("student", 0.80, seed=0), make_row("student", 0.84, seed=1), make_row("student", 0.84, seed=1)]
    assert "| 2 | 82.00 ± 2.83 |" in format_table(rows)


def test_the_command_names_no_path_and_no_token(monkeypatch, tmp_path):
    """A results file that is pushed to the Hub would publish the user's name, folders and write access."""
    token = "hf_abcdefghijKLMNOPQRST0123456789abcd"
    words = ["/home/alice/work/glue_distill.py", "--output_dir", "/home/alice/runs/sst2", "--hub_token", token]
    monkeypatch.setattr(sys, "argv", [*words, "--train_file", "data/my train.csv", "--seed", "3"])
    assert describe_run()["command"] == (
        "python glue_distill.py --output_dir sst2 --hub_token hf_*** --train_file 'data/my train.csv' --seed 3"
    )
    write_results(tmp_path / "results.json", [])
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert json.loads(text)["rows"] == []
    assert "alice" not in text
    assert token[3:] not in text


def test_the_command_names_no_path_behind_an_equals_sign(monkeypatch):
    """`--output_dir=/home/alice/runs` is the same flag, and would publish the same folder."""
    monkeypatch.setattr(sys, "argv", ["/home/alice/glue_distill.py", "--output_dir=/home/alice/runs/sst2"])
    assert describe_run()["command"] == "python glue_distill.py --output_dir=sst2"


def test_a_teacher_that_scores_nothing_has_a_table():
    """Matthews' correlation of a teacher that knows nothing is 0: no table, after the whole training."""
    assert "| cola | student distilled |" in format_table(
        [make_row("teacher", 0.0, task="cola"), make_row("student", 0.1, task="cola")]
    )


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """What a kill leaves of half a file would be read as all of it."""
    path = tmp_path / "found.txt"
    write_whole(path, "before\n")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "after \ud800\n")
    assert path.read_text() == "before\n"
    write_whole(path, "after\n")
    assert path.read_text() == "after\n" and [path.name for path in tmp_path.iterdir()] == ["found.txt"]
