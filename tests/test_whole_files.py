"""A full disk or a kill in the middle of a write leaves the file that was there before, and none that is half.

A file that may not grow any further stands for the disk: the system refuses the write at a chosen byte, or, where the
process does not ask for the error, kills it there.
"""

import json
import os
import signal
import sys
import time

import pytest
import torch
from conftest import make_dataset, make_model
from test_bad_input import files_in
from test_security import HONEST, make_student

from hf_kd import cache_teacher_signals
from hf_kd.deploy.hub import published_files
from hf_kd.deploy.model_card import write_model_card
from hf_kd.deploy.report import write_report
from hf_kd.deploy.staging import staged
from hf_kd.files import write_whole
from hf_kd.results import read_results, write_results
from hf_kd.signals import Wanted


pytestmark = pytest.mark.one_leg


resource = pytest.importorskip("resource", reason="the system has no limits to set")

MAKE_ROOM = "Make room on the disk, or give a folder that can be written, and run again"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A child of fork has none of its parent's threads, and would wait for them for good."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_files_up_to(size, action, *, is_killed=False):
    """
    Run an action in a process whose files end at `size` bytes.

    Returns:
        `str` or `None`: The error that it ended with; empty if there was none. `None` if it was killed.
    """
    read_end, write_end = os.pipe()
    process = os.fork()
    if process == 0:
        message = ""
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # not the files in which pytest keeps what is printed
            signal.alarm(120)  # whatever it waits for
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if is_killed else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            action()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(write_end, message.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        message = pipe.read().decode()
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGXFSZ and is_killed, signal.Signals(os.WTERMSIG(status)).name
        return None
    return message


def without_leftovers(folder):
    """Files but for those that a killed process was writing."""
    return {name: content for name, content in files_in(folder).items() if not name.endswith(".tmp")}


# Each writes again what is there, and differently: a folder to write to, what to call, and the files it writes.


def results_file(folder):
    rows = [{"role": "student", "task": "before", "metrics": {}}]
    write_results(folder / "results.json", rows)
    more = [*rows, {"role": "student", "task": "after", "metrics": {}}]
    return lambda: write_results(folder / "results.json", more), ["results.json"]


def card(folder):
    make_student(folder / "student", HONEST)
    (folder / "student" / "README.md").write_text(write_model_card(folder / "student").read_text() + "\nbefore\n")
    results = {**read_results(folder / "student" / "results.json"), "comparisons": []}
    (folder / "student" / "results.json").write_text(json.dumps(results))
    return lambda: write_model_card(folder / "student"), ["student/README.md"]


def report(folder):
    pytest.importorskip("matplotlib")
    (folder / "results.json").write_text(json.dumps(HONEST))
    (folder / "report.md").write_text("before\n")
    (folder / "pareto.png").write_bytes(b"before")
    return lambda: write_report(folder / "results.json"), ["report.md", "pareto.png"]


def text(folder):
    write_whole(folder / "predictions.json", "before\n")
    return lambda: write_whole(folder / "predictions.json", "after\n" * 5000), ["predictions.json"]


@pytest.mark.parametrize("make", [results_file, card, report, text], ids=lambda make: make.__name__)
def test_a_write_that_ends_in_the_middle(tmp_path, make):
    """Half a results file is hours of training lost; half a card is what visitors see."""
    action, names = make(tmp_path)
    before = files_in(tmp_path)
    action()
    after = files_in(tmp_path)
    sizes = [len(after[name]) for name in names]
    assert before != after and before.keys() == after.keys()
    for size in sorted({0, max(sizes) // 2, max(sizes) - 1}):
        for name, content in before.items():
            (tmp_path / name).write_bytes(content)
        message = with_files_up_to(size, action)
        first = next(name for name, length in zip(names, sizes, strict=True) if length > size)
        assert message.startswith("OSError: [Errno 27] File too large; what was there before is as it was. "), message
        assert MAKE_ROOM in message and str(tmp_path / first) in message
        assert files_in(tmp_path) == before
        assert with_files_up_to(size, action, is_killed=True) is None
        assert without_leftovers(tmp_path) == before
        assert not [name for name in published_files(tmp_path) if name.endswith(".tmp")]
        for leftover in tmp_path.rglob("*.tmp"):
            leftover.unlink()
    action()
    assert files_in(tmp_path).keys() == after.keys()


def test_a_full_disk(tmp_path):
    """The device that is always full says so at another place than a file that may not grow: when it is closed."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    path = tmp_path / "results.json"
    write_whole(path, "before\n")
    (tmp_path / f"results.json.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device; what was there before is as it was. Make room"):
        write_whole(path, "after\n")
    assert files_in(tmp_path) == {"results.json": b"before\n"}


# A cache of several shards


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """`cache()` makes one of 4 shards, or goes on with it, and gives its rows."""
    for name in ("_MIN_SHARD_ROWS", "_MAX_SHARD_ROWS"):
        monkeypatch.setattr(f"hf_kd.signals.cache.{name}", 4)
    rows, teacher = make_dataset(16), make_model(seed=1)
    return lambda: cache_teacher_signals(
        rows, teacher, Wanted(hidden=frozenset({1})), tmp_path / "cache", device="cpu"
    )[:]


def test_a_cache_on_a_full_disk(tmp_path, cache):
    """Rows without signals would train without a teacher; or the hours before a full disk be lost."""
    expected, folder = cache(), tmp_path / "cache"
    whole = files_in(folder)
    assert sum(name.endswith(".arrow") for name in whole) == 4
    size_of = {name: len(content) for name, content in whole.items()}
    shards = sorted(name for name in whole if name.endswith(".arrow"))
    largest = max(size_of[name] for name in shards)
    for size in (64, size_of["cache.json"] // 2, largest - 1):
        for is_killed in (False, True):
            for name in (*shards[1:], "cache.json", *(name.replace(".arrow", ".json") for name in shards[2:])):
                (folder / name).unlink(missing_ok=True)
            (folder / "cache.json").write_bytes(whole["cache.json"])
            message = with_files_up_to(size, cache, is_killed=is_killed)
            if is_killed:
                assert message is None
            else:
                assert "File too large" in message and MAKE_ROOM in message and str(folder) in message, message
                assert not list(folder.glob("*.tmp"))
            for name, content in without_leftovers(folder).items():
                assert content == whole[name], name  # complete
            assert (folder / shards[0]).read_bytes() == whole[shards[0]]
            assert cache() == expected
            assert without_leftovers(folder) == whole
            for leftover in folder.glob("*.tmp"):
                leftover.unlink()


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_new_cache_on_a_full_disk(tmp_path, cache, is_killed):
    """A description that is half there would have the folder refused, or taken for another's."""
    message = with_files_up_to(100, cache, is_killed=is_killed)
    if is_killed:
        assert message is None
    else:
        assert str(tmp_path / "cache" / "cache.json") in message and MAKE_ROOM in message
    assert without_leftovers(tmp_path) == {}
    expected = cache()
    assert cache() == expected


# An export


def publish(output_dir, size=1000):
    with staged(output_dir) as staging:
        for name in ("config.json", "onnx/model.onnx", "onnx/model_quantized.onnx"):
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(b"n" * (size if name.endswith(".onnx") else 10))


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("size", [0, 10, 999])
def test_an_export_that_ends_in_the_middle(tmp_path, is_there, size):
    """Half a model beside whole ones of before would load, and answer wrongly."""
    output = tmp_path / "out"
    if is_there:
        publish(output, size=500)
    before = files_in(tmp_path)
    message = with_files_up_to(size, lambda: publish(output))
    assert "File too large; nothing new is there. " + MAKE_ROOM in message and str(output) in message
    assert files_in(tmp_path) == before and sorted(tmp_path.iterdir()) == ([output] if is_there else [])
    assert with_files_up_to(size, lambda: publish(output), is_killed=True) is None
    assert {name: content for name, content in files_in(tmp_path).items() if ".out-" not in name} == before
    publish(output)
    (leftover,) = (output if is_there else tmp_path).glob(".out-*")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(leftover, (two_days_ago, two_days_ago))
    publish(output)
    assert sorted(files_in(tmp_path)) == ["out/config.json", "out/onnx/model.onnx", "out/onnx/model_quantized.onnx"]


def test_a_model_that_is_exported_to_a_full_disk(tmp_path, tokenizer):
    """The writers of other packages are not ours, and each may leave half a file in its own way."""
    pytest.importorskip("onnxruntime")
    from hf_kd.deploy.onnx import export_onnx

    student = tmp_path / "student"
    make_model(num_hidden_layers=1).save_pretrained(student)
    tokenizer.save_pretrained(student)
    before = files_in(tmp_path)
    size = (student / "model.safetensors").stat().st_size // 2
    message = with_files_up_to(size, lambda: export_onnx(student, student, quantization=None))
    assert message and files_in(tmp_path) == before
    assert "Make room" in message and str(student) in message, message
