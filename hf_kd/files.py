"""Files that are complete or not there."""

import os
from pathlib import Path


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write a text file, complete or not at all: a kill leaves the one before."""
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
