"""Makes a folder's new files appear all together, or not at all."""

import contextlib
import glob
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..files import unwritable_explained


_LEFTOVER_SECONDS = 24 * 3600


@contextlib.contextmanager
def staged(output_dir: Path) -> Iterator[Path]:
    """
    Write into the folder that this yields; when the block ends without an error its contents move to `output_dir`.

    Files and folders of the same names are replaced, others stay. Moving only renames, which needs no space on the
    disk; if one fails, all are undone. (A process that is killed between two renames into a folder that was there
    before leaves new beside old; a new folder appears by one. What a killed process was writing is in a hidden folder,
    which one of the next days' calls removes.)

    Args:
        output_dir (`Path`): Where the files will be; made if it is not there.

    Raises:
        `OSError`: If nothing can be written there, or the disk is full.
    """
    output_dir = output_dir.resolve()
    is_new = not output_dir.exists()
    missing_parents = [parent for parent in output_dir.parents if not parent.exists()]
    # On the same disk: beside a new folder, which then is one rename, and inside one that is there.
    hidden = f".{output_dir.name}-{uuid.uuid4().hex[:8]}"
    staging = output_dir.parent / hidden if is_new else output_dir / hidden
    try:
        with unwritable_explained(output_dir, "nothing new is there"):
            _remove_leftovers(output_dir)
            staging.mkdir(parents=True)
            yield staging
            if is_new:
                staging.rename(output_dir)
            else:
                _move_all(staging, output_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in missing_parents:
            with contextlib.suppress(OSError):  # it holds the new folder
                parent.rmdir()


def is_staging(path: Path, output_dir: Path) -> bool:
    """Whether a folder is what a call of [`staged`] writes to, or wrote to when it was killed."""
    return re.fullmatch(rf"\.{re.escape(output_dir.resolve().name)}-[0-9a-f]{{8}}", path.name) is not None


def _remove_leftovers(output_dir: Path) -> None:
    """Of processes that were killed while they wrote; one that was killed between two renames holds old files."""
    for folder in (output_dir, output_dir.parent):
        for path in folder.glob(f".{glob.escape(output_dir.name)}-*"):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                is_old = time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS
                if is_staging(path, output_dir) and is_old and not (path / "old").exists():
                    shutil.rmtree(path, ignore_errors=True)


def _move_all(staging: Path, output_dir: Path) -> None:
    new = sorted(staging.iterdir())
    old = staging / "old"
    old.mkdir()
    moved: list[Path] = []
    try:
        for path in new:
            target = output_dir / path.name
            if target.exists():
                target.rename(old / path.name)
            moved.append(path)
            path.rename(target)
    except OSError:
        for path in reversed(moved):
            target = output_dir / path.name
            if target.exists():
                target.rename(path)
            if (old / path.name).exists():
                (old / path.name).rename(target)
        raise
