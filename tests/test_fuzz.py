"""What people write as flags, YAML, layer maps and schedules: read as it stands, or refused with a message.

Of what is random altogether next to nothing can be read. So most of it is right but for one slip, or altogether.
"""

import json
import math
import string
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hf_kd.command_line import _is_on_purpose, _Loader, parse_args
from hf_kd.objective.schedules import Schedule, read_schedule, read_temperature_schedule
from hf_kd.signals.layers import LayerPair, layer_pairs


pytestmark = pytest.mark.one_leg


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


def refused(action, naming=""):
    """Whether it was refused, by an error that we raised and that says something, or names this."""
    try:
        action()
    except ValueError as error:
        assert _is_on_purpose(error, parse_args), error
        assert str(error).strip() != "" and naming in str(error), error
        return True
    return False


@pytest.fixture
def outcomes():
    """How many examples were refused (`True`) and read: were nearly all of one kind, the test would show little."""
    found = Counter()
    yield found
    assert min(found[True], found[False]) > 0.2 * found.total(), found


@st.composite
def slips(draw, pieces, right):
    """What is right, or half of the time, what a piece was lost from, added to, or put in the place of another."""
    written = draw(right)
    if draw(st.booleans()):
        return written
    start = draw(st.integers(0, len(written)))
    end = draw(st.integers(start, min(start + 3, len(written))))
    return written[:start] + draw(pieces) + written[end:]


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


LINES = {
    "name": ("run", "'-x'", "1:4", "no", "2020-01-01", '"a\\tb: c"', "é # the name"),
    "size": ("12", "0", "-3", "'7'"),
    "rate": ("1e-5", ".5", "3", "-1.0e+2"),
    "is_fast": ("true", "False", "yes"),
    "title": ("~", "null", "|\n  two\n  lines", ">-\n  a\n  title"),
    "layers": ("[1, 2]", "\n- 1\n- 2", "~", "[3]"),
    "rates": ("[1e-5, 2]", "[.5]", "\n  - 1"),
    "names": ("[a, 'b c']", "\n- no\n- 1:4"),
    "kind": ("first", "last"),
    "options": ("{a: 1, b: [x, ~]}", "\n  a: 1e-5\n  b: {c: true}", "text"),
}
YAML_TEXTS = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in LINES.items()}).map(
    lambda values: "".join(f"{name}: {value}\n" for name, value in values.items()) or "{}"
)


@cases("yaml_text")
@given(slips(st.sampled_from(PIECES) | st.text(max_size=4), YAML_TEXTS))
@example("size: !!int ''")
@example("is_fast: !!bool 3")
@example("name: !!timestamp x")
@example("options: {a: 2020-01-01}")
@example("options: &a {b: *a}")
@example("layers: &a [*a]")
@example("{? [a]: 1}")
@example("[" * 5000)
@example("name: \ud83d")
def test_any_yaml_is_read_or_refused(path, outcomes, text):
    """A YAML that somebody mistyped would end in a traceback through the parser, which names no line of theirs."""
    path.write_bytes(text.encode(errors="surrogatepass"))
    runs = []
    outcomes[refused(lambda: runs.extend(parse_args((Run,), [str(path)])))] += 1
    assert all(map(is_run, runs))


@pytest.mark.parametrize(
    "text",
    [
        "name: x\noptions: &a {b: *a}",
        "name: x\nlayers: &a [1, *a]",
        "options: &a\n  <<: *a",
        "&a name: x\n? *a\n: &b [*b]",
    ],
)
def test_a_value_that_holds_itself(path, text):
    """It would end in the error of whatever first walks through it, or in no end at all."""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot be read: line \d: \*(.) stands within &\1.*; write the value out"):
        parse_args((Run,), [str(path)])
    path.write_text("layers: &a [1, 2]\nrates: *a", encoding="utf-8")
    assert parse_args((Run,), [str(path)]) == (Run(layers=[1, 2], rates=[1.0, 2.0]),)


WORDS = st.text(string.ascii_letters, min_size=1, max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
# PyYAML writes the others in a way that it reads as spaces.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029"), max_size=6)
SCALARS |= TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner))
POSITIVE = st.floats(min_value=0, allow_infinity=False)
RIGHT_VALUES = {
    "name": SCALARS,
    "size": st.integers(),
    "rate": POSITIVE | st.integers(-9, 9),
    "is_fast": st.booleans(),
    "title": SCALARS,
    "layers": st.lists(st.integers(), min_size=1, max_size=3),
    "rates": st.lists(POSITIVE | st.integers(-9, 9), min_size=1, max_size=3),
    "names": st.lists(WORDS, min_size=1, max_size=3),
    "kind": st.sampled_from(["first", "last"]),
    "options": st.dictionaries(TEXTS, VALUES, max_size=3),
}


class Dumper(yaml.SafeDumper):
    """Quotes the texts that would be numbers in YAML 1.2, which the recipes read, such as 0E0."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


@cases("yaml_values")
@given(
    st.fixed_dictionaries({}, optional=RIGHT_VALUES),
    st.just({}) | st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=1),
)
@example({"name": "-x", "names": ["a", "b"], "rate": 5e-324}, {})
@example({"names": ["-x"]}, {})
@example({"options": {"a": [{"b": None}]}}, {})
@example({"options": {"0E0": None}}, {})
def test_values_arrive_as_they_were_written(path, outcomes, right, others):
    """A value of one type would arrive as another, or a list of lists as the text of a list."""
    values = {**right, **others}
    path.write_text(yaml.dump(values, Dumper=Dumper, allow_unicode=True), encoding="utf-8")
    runs = []
    outcomes[refused(lambda: runs.extend(parse_args((Run,), [str(path)])))] += 1
    if not runs:
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
        elif isinstance(arrived, bool):
            assert arrived == (str(value).lower() in ("yes", "true", "t", "y", "1"))
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


def flag_of(name, words):
    return words.map(lambda words: [f"--{name}", *words])


NUMBERS = st.integers(-9, 9).map(str)
FLAGS = [
    flag_of("name", WORDS.map(lambda word: [word])),
    flag_of("size", st.tuples(NUMBERS)),
    flag_of("rate", st.tuples(NUMBERS | st.floats(0, 1).map(str))),
    flag_of("is_fast", st.sampled_from([[], ["true"], ["False"]])),
    flag_of("layers", st.lists(NUMBERS, min_size=1, max_size=3)),
    flag_of("rates", st.lists(NUMBERS, min_size=1, max_size=3)),
    flag_of("names", st.lists(WORDS, min_size=1, max_size=3)),
    flag_of("kind", st.sampled_from([["first"], ["last"]])),
    WORDS.map(lambda word: [f"--title={word}"]),
]
OTHER_WORDS = st.sampled_from([*(f"--{name}" for name in FIELDS), "--siz", "-s", "--"]) | st.text(max_size=5)


@cases("flag_words")
@given(
    slips(
        st.lists(OTHER_WORDS, max_size=2),
        st.lists(st.one_of(FLAGS), max_size=4).map(lambda flags: [word for flag in flags for word in flag]),
    )
)
@example(["--size=1", "--", "--rate"])
@example(["-1"])
def test_any_words_are_read_or_refused(outcomes, words):
    """A mistyped flag would end in a traceback, or be dropped and its default train."""
    runs = []
    outcomes[refused(lambda: runs.extend(parse_args((Run,), words)))] += 1
    assert all(map(is_run, runs))


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
    if refused(lambda: pairs.extend(layer_pairs(text, num_student, num_teacher, first_layer=first_layer)), repr(text)):
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


# Schedules


def two(low, high):
    return st.lists(st.floats(low, high), min_size=2, max_size=2, unique=True)


SCHEDULES = st.builds("{0}:{1[0]}:{1[1]}".format, st.sampled_from(["linear", "cosine"]), two(0, 2))
SCHEDULES |= st.builds("window:{0[0]}:{0[1]}".format, two(0, 1).map(sorted))


@cases("schedule_text")
@given(
    slips(
        st.sampled_from(["step", "linear", ":", "0", "-", "nan", "inf", "1e400", "x", " ", "_", ""]) | st.text(),
        SCHEDULES,
    )
)
@example("constant")
@example("constant:1:1")
@example("linear:1_0:0")
@example("linear:\u0661:0")
def test_any_schedule_is_read_or_refused(outcomes, text):
    """A weight would become NaN or negative in the middle of a training."""
    schedules = []
    outcomes[refused(lambda: schedules.append(read_schedule(text)))] += 1
    if schedules:
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
