"""Makes a folder's new files appear all together, or not at all."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged(output_dir: Path, folder: str, keep_files: bool) -> Iterator[Path]:
    """
    Write into the folder that this yields; when the block ends without an error its contents move to `output_dir`.

    Moving only renames, which needs no space on the disk. Whatever happens, nothing else is left behind.

    Args:
        output_dir (`Path`): Where the files will be; made if it is not there.
        folder (`str`): The one subfolder, which replaces an earlier one as a whole.
        keep_files (`bool`): Whether files that are there already stay; the subfolder is replaced in any case.

    Raises:
        `OSError`: If nothing can be written there.
    """
    output_dir = output_dir.resolve()
    is_new = not output_dir.exists()
    # On the same disk: beside a new folder, which then is one rename, and inside one that is there.
    hidden = f".{output_dir.name}-{uuid.uuid4().hex[:8]}"
    staging = output_dir.parent / hidden if is_new else output_dir / hidden
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        message = f"{error.strerror}; choose an output_dir that can be written"
        raise OSError(error.errno, message, str(output_dir)) from error
    try:
        yield staging
        if is_new:
            staging.rename(output_dir)
        else:
            _replace_folder(staging / folder, output_dir / folder, old=staging / "old")
            for file in staging.iterdir():
                if file.is_file() and not (keep_files and (output_dir / file.name).exists()):
                    file.replace(output_dir / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_folder(new: Path, target: Path, old: Path) -> None:
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
