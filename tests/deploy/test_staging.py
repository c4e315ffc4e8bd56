"""A folder's new files appear all together or not at all, also when a rename fails half way."""

from pathlib import Path

import pytest
from test_bad_input import files_in

from hf_kd.deploy.staging import staged


OLD = {"config.json": b"old", "kept.txt": b"mine", "onnx/model.onnx": b"old", "tokenizer.json": b"old"}
NEW = {"config.json": b"new", "added.txt": b"new", "onnx/model.onnx": b"new", "tokenizer.json": b"new"}


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def publish(output_dir):
    with staged(output_dir) as staging:
        write(staging, NEW)


def test_new_files_replace_those_of_their_names(tmp_path):
    """A stale file beside new ones, or a lost one of the user's, would be found long after."""
    write(tmp_path / "out", OLD)
    publish(tmp_path / "out")
    assert files_in(tmp_path) == {f"out/{name}": content for name, content in {**OLD, **NEW}.items()}


@pytest.mark.parametrize("failing", range(7))  # three old ones are moved away, four new ones in
def test_a_rename_that_fails_is_undone(tmp_path, monkeypatch, failing):
    """New weights beside the old config would load, and answer wrongly."""
    write(tmp_path / "out", OLD)
    rename, count = Path.rename, 0

    def fail_once(path, target):
        nonlocal count
        count += 1
        if count == failing + 1:
            raise OSError("no more")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="no more"):
        publish(tmp_path / "out")
    assert files_in(tmp_path) == {f"out/{name}": content for name, content in OLD.items()}


def test_an_error_leaves_nothing_of_a_new_folder(tmp_path):
    """Half an export would be taken for one, and the next would refuse the folder."""
    with pytest.raises(ValueError, match="stop"), staged(tmp_path / "parent" / "out") as staging:
        write(staging, NEW)
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []
