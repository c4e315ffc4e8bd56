"""Files that are complete or not there."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


_UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
}
_ADVICE = "Make room on the disk, or give a folder that can be written, and run again"


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8, complete or not at all, see [`whole_file`]."""
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """
    Write to the name beside it that this yields; when the block ends without an error, the file has its own name.

    Whatever happens before, the file that had the name is there as it was. A killed process leaves what it was
    writing under the other name, `NAME.PID.tmp`, which nothing reads.

    Args:
        path (`str` or `Path`): The file, in a folder that is there.

    Raises:
        `OSError`: If it cannot be written, naming the file and what to do.
    """
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with unwritable_explained(path, "what was there before is as it was"):
            yield beside
            with beside.open("rb+") as file:  # some file systems notice only here that the disk is full
                os.fsync(file.fileno())
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def unwritable_explained(path: str | os.PathLike, meanwhile: str) -> Iterator[None]:
    """Raise an `OSError` of writing again, with the file's or folder's name, what is there `meanwhile`, and what to
    do."""
    try:
        yield
    except OSError as error:
        # Of something else, or of a file within; numpy gives no number.
        if error.errno not in (None, *_UNWRITABLE) or _ADVICE in str(error):
            raise
        raise OSError(
            error.errno or errno.EIO, f"{error.strerror or error}; {meanwhile}. {_ADVICE}", os.fspath(path)
        ) from error
