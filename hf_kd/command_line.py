"""Reads a YAML file and overriding flags into argument dataclasses."""

import difflib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_args(dataclass_types: Sequence[type], argv: Sequence[str] | None = None, **defaults: Any) -> tuple[Any, ...]:
    """Parse `[config.yaml] [--flag value ...]`; flags override the file, which overrides `defaults`.

    Args:
        dataclass_types (sequence of `type`): The argument dataclasses, as for [`~transformers.HfArgumentParser`].
        argv (sequence of `str`, *optional*): The arguments; those of the process by default.
        defaults: Values that differ from the dataclasses' own defaults.

    Returns:
        `tuple`: One instance of each dataclass.

    Raises:
        ValueError: If the YAML file cannot be read or names an unknown argument.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False)
    known = {action.dest for action in parser._actions} - {"help"}
    config = {}
    if argv and argv[0].endswith((".yaml", ".yml")):
        config = _read_yaml(Path(argv.pop(0)), known)
    flags = [*_as_flags(defaults), *_as_flags(config), *argv]
    return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)


def _read_yaml(path: Path, known: set[str]) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"the configuration {path} cannot be read: {error}") from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError(
            f"the configuration {path} must hold lines `argument: value`, but holds {type(config).__name__}."
        )
    for name in config:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "`--help` lists the arguments."
            raise ValueError(f"the configuration {path} sets {name!r}, which is no argument; {hint}")
    return config


class _Loader(yaml.SafeLoader):
    """The safe loader, with numbers and words as YAML 1.2 has them, which refuses a key that is written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise yaml.YAMLError(f"{', '.join(twice)} is set twice; keep one line.")
        return mapping


# As YAML 1.2 reads them: 5e-5 is a number, 1:4, a layer map, is none (in YAML 1.1 it is 64, to base 60), and `no`,
# as in `save_strategy: no`, is a word.
_SCALARS = {
    "tag:yaml.org,2002:bool": "true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9]*)",
    "tag:yaml.org,2002:float": r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _SCALARS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for tag, pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), list("-+.0123456789tTfF"))


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
