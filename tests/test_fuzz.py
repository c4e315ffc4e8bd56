"""What people write as flags, YAML, layer maps and schedules: read as it stands, or refused with a message."""

import json
import math
import string
from dataclasses import dataclass
from typing import Literal

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hf_kd.command_line import parse_args
from hf_kd.objective.schedules import Schedule, read_schedule, read_temperature_schedule
from hf_kd.signals.layers import LayerPair, layer_pairs


# Examples of each test below; those that are written out with @example come on top.
CASES = {
    "yaml_text": 300,
    "yaml_values": 300,
    "flags": 300,
    "flag_words": 300,
    "layer_map_text": 500,
    "layer_map_pairs": 300,
    "schedule_text": 500,
    "schedule_numbers": 300,
}


def cases(name):
    """The same examples each time, on a slow machine too."""
    return settings(
        max_examples=CASES[name],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass
class Run:
    name: str = "run"
    size: int = 12
    rate: float = 1e-3
    is_fast: bool = False
    title: str | None = None
    layers: list[int] | None = None
    rates: list[float] | None = None
    names: list[str] | None = None
    kind: Literal["first", "last"] = "first"
    options: dict | str | None = None


FIELDS = ("name", "size", "rate", "is_fast", "title", "layers", "rates", "names", "kind", "options")
PIECES = (
    "name",
    "size",
    "rate",
    "layers",
    "1:4",
    "~",
    "null",
    "[",
    "]",
    "{",
    "}",
    ",",
    ": ",
    ":",
    "- ",
    "\n",
    "  ",
    "#",
)
PIECES += (
    "!!int ",
    "!!python/none ",
    "!x ",
    "&a ",
    "*a",
    "<<",
    "=",
    "? ",
    "|",
    ">",
    "'",
    '"',
    "1e-5",
    "-",
    ".inf",
    "true",
)
PIECES += (
    "2020-01-01",
    "0x1F",
    "1_0",
    "%",
    "@",
    "`",
    "\t",
    "\x00",
    "\ud83d",
    "\x85",
    "é",
    "\U0001f600",
    "--",
    "---\n",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "run.yaml"


def refused(action):
    """Whether it raised a ValueError, which must say something."""
    try:
        action()
    except ValueError as error:
        assert str(error).strip() != ""
        return True
    return False


def is_run(run):
    """Whether each value has the type of its field."""
    lists = {"layers": int, "rates": float, "names": str}
    values = vars(run)
    return (
        all(type(values[name]) is kind for name, kind in {"name": str, "size": int, "rate": float}.items())
        and type(run.is_fast) is bool
        and run.kind in ("first", "last")
        and all(values[name] is None or all(type(x) is kind for x in values[name]) for name, kind in lists.items())
    )


# Flags and YAML


@cases("yaml_text")
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join))
@example("size: !!int ''")
@example("is_fast: !!bool 3")
@example("name: !!timestamp x")
@example("options: {a: 2020-01-01}")
@example("options: &a {b: *a}")
@example("layers: &a [*a]")
@example("{? [a]: 1}")
@example("[" * 5000)
@example("name: \ud83d")
def test_any_yaml_is_read_or_refused(path, text):
    """A YAML that somebody mistyped would end in a traceback through the parser, which names no line of theirs."""
    path.write_bytes(text.encode(errors="surrogatepass"))
    runs = []
    if not refused(lambda: runs.extend(parse_args((Run,), [str(path)]))):
        assert is_run(runs[0])


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


@cases("yaml_values")
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
@example({"name": "-x", "names": ["a", "b"], "rate": 5e-324})
@example({"names": ["-x"]})
@example({"options": {"a": [{"b": None}]}})
def test_values_arrive_as_they_were_written(path, values):
    """A value of one type would arrive as another, or a list of lists as the text of a list."""
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    runs = []
    if refused(lambda: runs.extend(parse_args((Run,), [str(path)]))):
        return
    (run,) = runs
    assert is_run(run)
    for name, value in values.items():
        arrived = getattr(run, name)
        if value is None:
            assert arrived == getattr(Run(), name)
        elif isinstance(value, dict):
            assert json.loads(arrived) == value
        elif isinstance(value, list):
            assert [str(item) for item in arrived] == [str(item) for item in value] or arrived == [*map(float, value)]
        elif isinstance(arrived, str):
            assert arrived == str(value)
        else:
            arrived = arrived[0] if isinstance(arrived, list) else arrived
            assert str(arrived) == str(value) or arrived == float(value)


@cases("flags")
@given(
    st.builds(
        Run,
        name=st.text(string.printable),
        size=st.integers(),
        rate=st.floats(allow_nan=False),
        is_fast=st.booleans(),
        title=st.none() | st.text(),
        layers=st.none() | st.lists(st.integers(min_value=0), min_size=1),
        names=st.none() | st.lists(st.text(string.ascii_letters, min_size=1), min_size=1),
        kind=st.sampled_from(["first", "last"]),
    )
)
def test_flags_round_trip(run):
    """A run that is started with the arguments of another would train with other values."""
    words = []
    for name, value in vars(run).items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    assert parse_args((Run,), words) == (run,)


@cases("flag_words")
@given(
    st.lists(
        st.sampled_from([*(f"--{name}" for name in FIELDS), "--siz", "-s", "--"]) | st.text(max_size=5), max_size=8
    )
)
@example(["--size=1", "--", "--rate"])
@example(["-1"])
def test_any_words_are_read_or_refused(words):
    """A mistyped flag would end in a traceback, or be dropped and its default train."""
    runs = []
    if not refused(lambda: runs.extend(parse_args((Run,), words))):
        assert is_run(runs[0])


# Layer maps


@cases("layer_map_text")
@given(
    st.text("0123456789:,- _+\u0661", max_size=12) | st.sampled_from(["uniform", "last", "first"]) | st.text(),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 1),
)
@example("9" * 5000 + ":1", 2, 2, 0)
@example("1:1,1:2", 2, 2, 0)
@example("1_0: +1", 12, 2, 0)
@example("\u0661:1", 2, 2, 1)
def test_any_layer_map_is_read_or_refused(text, num_student, num_teacher, first_layer):
    """A map that is half understood would compare layers that nobody named."""
    pairs = []
    if refused_naming(
        text, lambda: pairs.extend(layer_pairs(text, num_student, num_teacher, first_layer=first_layer))
    ):
        return
    students = [pair.student for pair in pairs]
    assert pairs != [] and len(set(students)) == len(students)
    assert all(first_layer <= student <= num_student for student in students)
    assert all(first_layer <= pair.teacher <= num_teacher for pair in pairs)
    if text not in ("uniform", "last", "first"):
        assert pairs == [LayerPair(*map(int, part.split(":"))) for part in text.split(",")]


@cases("layer_map_pairs")
@given(st.dictionaries(st.integers(0, 6), st.integers(0, 12), min_size=1))
def test_pairs_are_read_as_they_are_written(mapping):
    """The command line and Python would give one map two meanings."""
    pairs = [LayerPair(*pair) for pair in mapping.items()]
    assert layer_pairs(",".join(f"{student}:{teacher}" for student, teacher in pairs), 6, 12) == pairs
    assert layer_pairs(pairs, 6, 12) == pairs


def refused_naming(text, action):
    """Whether it raised a ValueError that names the text."""
    try:
        action()
    except ValueError as error:
        assert repr(text) in str(error), error
        return True
    return False


# Schedules


@cases("schedule_text")
@given(
    st.builds(
        lambda kind, numbers: ":".join([kind, *numbers]),
        st.sampled_from(["constant", "linear", "cosine", "window", "step", ""]),
        st.lists(st.sampled_from(["0", "1", "0.5", "-1", "nan", "inf", "1e400", "x", " 1", ""]), max_size=3),
    )
    | st.text()
)
@example("linear:1_0:0")
@example("linear:\u0661:0")
def test_any_schedule_is_read_or_refused(text):
    """A weight would become NaN or negative in the middle of a training."""
    schedules = []
    if not refused(lambda: schedules.append(read_schedule(text))):
        assert_usable(schedules[0], at_least=0.0)
        assert text == "constant" or text.count(":") == 2 or text.strip() == "constant"
    if not refused(lambda: schedules.append(read_temperature_schedule(text))):
        assert_usable(schedules[-1], at_least=5e-324)


@cases("schedule_numbers")
@given(st.sampled_from(["linear", "cosine", "window"]), st.floats(0, 1), st.floats(0, 1))
def test_schedules_round_trip(kind, start, end):
    """A number that the command line gives would be rounded, or taken for the other."""
    schedules = []
    if not refused(lambda: schedules.append(Schedule(kind, start, end))):
        assert read_schedule(f"{kind}:{start}:{end}") == schedules[0]
        assert_usable(schedules[0], at_least=0.0)


def assert_usable(schedule, at_least):
    for step in range(11):
        factor = schedule(step / 10)
        assert math.isfinite(factor) and factor >= at_least
    if schedule.kind != "window":
        assert min(schedule.start, schedule.end) >= at_least
