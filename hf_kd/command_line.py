"""What a recipe and the command line say to each other: a YAML file and flags one way, an error the other."""

import difflib
import dis
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser


def run_main(main: Callable[[], None]) -> None:
    """Run a recipe, where what is wrong with its input ends as one line, `error: ...`, and exit code 2.

    That is a `ValueError`, `OSError`, `ImportError` or `FloatingPointError` which a `raise` statement of hf_kd or of
    the recipe's folder made. All else is a bug, and keeps its traceback. (Under `accelerate launch` the launcher adds
    that its process failed, below the line.)

    Args:
        main (callable): The recipe's `main`.
    """
    try:
        main()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if not _is_on_purpose(error, main):
            raise
        sys.stdout.flush()
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None


def _is_on_purpose(error: BaseException, main: Callable[[], None]) -> bool:
    """Whether a `raise` of ours made the error, and not a function that we called: the traceback of what `int("x")`
    raises ends in the same module."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    path, recipe = Path(code.co_filename).resolve(), Path(main.__code__.co_filename).resolve()
    is_ours = path.is_relative_to(Path(__file__).resolve().parent) or path.parent == recipe.parent
    return is_ours and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def parse_args(dataclass_types: Sequence[type], argv: Sequence[str] | None = None, **defaults: Any) -> tuple[Any, ...]:
    """Parse `[config.yaml] [--flag value ...]`; flags override the file, which overrides `defaults`.

    Args:
        dataclass_types (sequence of `type`): The argument dataclasses, as for [`~transformers.HfArgumentParser`].
        argv (sequence of `str`, *optional*): The arguments; those of the process by default.
        defaults: Values that differ from the dataclasses' own defaults.

    Returns:
        `tuple`: One instance of each dataclass.

    Raises:
        ValueError: If the YAML file cannot be read, or the file or a flag names an unknown argument or gives one a
            value that it does not take.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(dataclass_types, allow_abbrev=False)
    known = {action.dest: action.nargs == "+" for action in parser._actions if action.dest != "help"}
    # Not of dataclasses.fields, whose types the parser has changed.
    types = {name: str(hint) for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
    mappings = {name for name, hint in types.items() if "dict" in hint}
    config = {}
    if argv and argv[0].endswith((".yaml", ".yml")):
        config = _read_yaml(Path(argv.pop(0)), known, mappings)
    if _asks_for_fp16([*_as_flags(config), *argv]):
        defaults.pop("bf16", None)
    flags = [*_as_flags({**defaults, **config}), *argv]
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
    # What TrainingArguments raises about a value, which may be a file that it opens or a package that is missing.
    except (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    if unknown:
        raise ValueError(f"{' '.join(unknown)!r:.80} is no argument; {_hint(unknown[0].lstrip('-'), known)}")
    return tuple(parsed)


class _Parser(HfArgumentParser):
    """Raises where argparse would print the hundreds of arguments there are, and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `--help` says what each argument takes.")


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.partition("=")[0], known, n=1)
    return f"did you mean {close[0]!r}?" if close else "`--help` lists the arguments."


def _read_yaml(path: Path, takes_list: dict[str, bool], takes_mapping: set[str]) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"the configuration {path} cannot be read: {error}") from error
    except RecursionError:
        raise ValueError(f"the configuration {path} cannot be read: it is nested too deeply.") from None
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError(
            f"the configuration {path} must hold lines `argument: value`, but holds {type(config).__name__}."
        )
    for name in config:
        if name not in takes_list:
            raise ValueError(
                f"the configuration {path} sets {name!r}, which is no argument; {_hint(name, takes_list)}"
            )
        value = config[name]
        is_plain = not isinstance(value, list | dict)
        is_list = isinstance(value, list) and not any(isinstance(item, list | dict | type(None)) for item in value)
        if not (is_plain or (is_list and takes_list[name]) or (isinstance(value, dict) and name in takes_mapping)):
            takes = "a list of values" if takes_list[name] else "a mapping" if name in takes_mapping else "one value"
            raise ValueError(f"the configuration {path} sets {name} to {value!r:.80}, but it takes {takes}.")
    return config


class _Loader(yaml.SafeLoader):
    """The safe loader, with numbers and words as YAML 1.2 has them, which refuses tags, a value that holds itself,
    and a key written twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag is not None:  # `!!int x` fails in as many ways as there are types
            raise yaml.YAMLError(f"the tag {tag} is not needed; write the value alone.")
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent) and node.end_mark is None:  # still being composed
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: *{event.anchor} stands within &{event.anchor}, which would hold "
                "itself; write the value out."
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise yaml.YAMLError(f"{', '.join(twice)} is set twice; keep one line.")
        return mapping


# As YAML 1.2 reads them: 5e-5 is a number, 1:4, a layer map, is none (in YAML 1.1 it is 64, to base 60), and `no`,
# as in `save_strategy: no`, is a word. A date, as in `output_dir: 2025-01-31`, is one too.
_SCALARS = {
    "tag:yaml.org,2002:bool": "true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9]*)",
    "tag:yaml.org,2002:float": r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (*_SCALARS, "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for tag, pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), list("-+.0123456789tTfF"))


def _asks_for_fp16(words: list[str]) -> bool:
    is_asked = False
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, _, value = word.partition("=")
        if name == "--fp16":
            is_asked = (value or following).lower() not in ("false", "f", "no", "n", "0")
    return is_asked


def _as_flags(values: dict[str, Any]) -> list[str]:
    """As flags, the values of the file are converted and checked by the one parser."""
    flags = []
    for name, value in values.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            # One word, so that a value may start with a dash.
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags
