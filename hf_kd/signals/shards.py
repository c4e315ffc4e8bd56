"""A folder of Arrow files that several processes write, each file complete or made again."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import whole_file, write_whole


_DESCRIPTION = "cache.json"
_DESCRIBED = ("fingerprint", "columns", "rows_per_shard", "source")
_LEFTOVER_SECONDS = 3600


class ShardFolder:
    """Shards of one table, and what they were made from.

    A shard counts when its note is there, which is written last and holds the hash of the file.

    Args:
        folder (`Path`): Made by [`open`] where it is missing.

    Attributes:
        num_shards (`int`): How many files the table has; to be set once the description says it.
    """

    def __init__(self, folder: Path):
        self.folder, self.num_shards = folder, 0

    def is_new(self) -> bool:
        """Whether nothing is there yet.

        Raises:
            ValueError: If the folder holds files that are of no cache.
        """
        if (self.folder / _DESCRIPTION).is_file():
            return False
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        foreign = sorted(path.name for path in paths if not path.name.startswith(_DESCRIPTION))
        if foreign:
            raise ValueError(
                f"{self.folder} holds {', '.join(foreign[:3])} and no {_DESCRIPTION}, so it is no cache; give an "
                "empty folder."
            )
        return True

    def open(self, description: dict[str, Any]) -> None:
        """Make the folder where it is missing, and describe it where it is new; on one process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.is_new():
            self.describe(description)

    def describe(self, description: dict[str, Any]) -> None:
        """Write what the shards were made from: `fingerprint`, `columns`, `rows_per_shard`, `source`, and more."""
        write_whole(self.folder / _DESCRIPTION, json.dumps(description, indent=2) + "\n")

    def description(self) -> dict[str, Any]:
        """What [`describe`] wrote, in this process or another, now or before a kill.

        Raises:
            ValueError: If it cannot be read.
        """
        path = self.folder / _DESCRIPTION
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return {**found, **{name: found[name] for name in _DESCRIBED}}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); give a folder that every machine sees, or delete this one."
            ) from None

    def is_noted(self) -> bool:
        """Whether all shards seem to be there, by their notes alone."""
        return all(self._note(index) and self._path(index).is_file() for index in range(self.num_shards))

    def is_complete(self, index: int) -> bool:
        """Whether a shard is there as it was written; reads all of it."""
        note = self._note(index)
        return bool(note) and self._path(index).is_file() and file_hash(self._path(index)) == note["hash"]

    def write(self, index: int, table: Any, features: Any, note: dict[str, Any]) -> None:
        """Write a shard beside its name, then rename it, then note it.

        A note of an older file stays until then: its hash is not that of the new one, and another run that loads this
        folder now still finds it.

        Raises:
            OSError: If the disk is full, for example; the shards before are complete, and need not be made again.
        """
        from datasets.arrow_writer import ArrowWriter

        path = self._path(index)
        with whole_file(path) as beside:
            with ArrowWriter(path=str(beside), features=features) as writer:
                writer.write_table(table)
                writer.finalize()
            found = {**note, "rows": table.num_rows, "bytes": beside.stat().st_size, "hash": file_hash(beside)}
        write_whole(path.with_suffix(".json"), json.dumps(found) + "\n")

    def load(self) -> Any:
        """All shards as one memory-mapped dataset.

        Raises:
            ValueError: If one is missing.
        """
        import datasets

        self.notes()
        return datasets.concatenate_datasets(
            [datasets.Dataset.from_file(str(self._path(index))) for index in range(self.num_shards)]
        )

    def notes(self) -> list[dict[str, Any]]:
        """What was noted of each shard: `hash`, `bytes`, `rows`, and what [`write`] was given.

        Raises:
            ValueError: If one is missing.
        """
        notes = [self._note(index) for index in range(self.num_shards)]
        missing = [self._path(index).name for index, note in enumerate(notes) if not note]
        if missing:
            raise ValueError(
                f"{self.folder} lacks {', '.join(missing[:3])} after all processes have written; give a folder that "
                "every machine sees."
            )
        return notes

    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("shard-*.arrow"))

    def remove_leftovers(self) -> None:
        """Files that a killed build was writing; another that runs now renames its own within seconds."""
        for path in self.folder.glob("*.tmp"):
            with suppress(FileNotFoundError):  # renamed, or removed by another
                if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                    path.unlink()

    def _path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}-of-{self.num_shards:05d}.arrow"

    def _note(self, index: int) -> dict[str, Any]:
        """What was noted of a shard; nothing for a torn note, as for none."""
        try:
            note = json.loads(self._path(index).with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) and {"hash", "bytes"} <= note.keys() else {}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()
