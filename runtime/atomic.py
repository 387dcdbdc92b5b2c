"""What appears whole or not at all: a temporary sibling, renamed into place."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError

# A directory of ours is known by one of these; `overwrite` replaces no other.
MANIFESTS = ("manifest.json", "memory.json", "engines.json")
SCHEMA_MARK = b'"knnmoe.'

STALE_AFTER_SECONDS = 60.0
STALE_FORM = ".{name}.{token}.partial"  # with a token of eight characters
OLD_FORM = ".{name}.{token}.old"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV)
_REPORTED = re.compile(r"\(os error (\d+)\)")
_AT_CWD, _EXCHANGE = -100, 2  # of renameat2


@contextmanager
def new_directory(
    final: str | Path, *, overwrite: bool = False, needed_bytes: int | None = None
) -> Iterator[Path]:
    """Yield a temporary sibling of `final`; it takes the final name when the block succeeds.

    Everything is on disk before the rename. If the block fails, for whatever reason, the temporary
    directory is removed and what was at `final` before is untouched.

    Args:
        final: The directory to create. It may exist if it is empty.
        overwrite: Replace a bundle or memory pack that is there.
        needed_bytes: What the block will write, if known: checked against the free space first.

    Raises:
        OutputError: If the parent is missing or not writable, something is in the way, or the disk
            is full, before or during the block.
    """
    target = Path(os.path.abspath(final))
    check_replaceable(target, overwrite=overwrite)
    remove_stale(target)
    if needed_bytes is not None:
        check_free_space(target.parent, needed_bytes)
    temporary = _make_sibling(target)
    lock = lock_directory(temporary)
    try:
        yield temporary
        sync_tree(temporary)
        # Once more: somebody may have written there meanwhile.
        check_replaceable(target, overwrite=overwrite)
        move_into_place(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        stated = as_output_error(error, target, temporary, needed_bytes)
        if stated is None:
            raise
        raise stated from error
    finally:
        if lock is not None:
            os.close(lock)


def write_file(target: Path, content: bytes) -> None:
    """Write a file; one that is there is replaced, or stays as it was if that fails.

    Raises:
        OutputError: If it cannot be written there.
    """
    temporary = target.with_name(STALE_FORM.format(name=target.name, token=secrets.token_hex(4)))
    try:
        remove_stale(target)
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
        sync(target.parent)
    except OSError as error:
        raise output_error(target, error, needed_bytes=len(content)) from error
    finally:
        with suppress(OSError):  # it is gone, or never was there
            temporary.unlink()


def check_replaceable(target: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` unless a directory may be created at `target`."""
    if not target.parent.is_dir():
        raise OutputError(
            target, "its parent directory does not exist", fix=f"Create {target.parent} first."
        )
    if target.is_symlink():
        raise OutputError(target, "is a symbolic link", fix="Name the directory it points to.")
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(target, "exists and is not a directory", fix="Choose another name.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            target,
            "exists and is not empty",
            fix="Choose another name, or pass --overwrite to replace it.",
        )
    if not _is_ours(target):
        raise OutputError(
            target,
            "is no bundle, memory pack or engine set, so it is not replaced",
            fix="Choose another name, or remove it yourself.",
        )


def check_copy(source: Path, target: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` unless a copy of one directory may be created as another one."""
    if source.exists() and target.exists() and source.samefile(target):
        raise OutputError(target, "is what is to be copied", fix="Choose another name.")
    check_replaceable(target, overwrite=overwrite)


def check_file(option: str, target: Path | None) -> None:
    """Raise `OutputError` if a file that an option names could not be written; None is none.

    For what is written after long work: whoever named it wants to know before.
    """
    if target is None:
        return
    if not target.parent.is_dir():
        raise OutputError(
            option, "names a file in a directory that does not exist", found=target.parent,
            fix=f"Create {target.parent} first.",
        )  # fmt: skip
    if target.is_dir():
        raise OutputError(option, "names a directory", expected="a file", found=target)
    if not os.access(target.parent, os.W_OK):
        raise OutputError(option, "names a file in a directory that cannot be written",
                          found=target.parent, fix="Choose another directory.")  # fmt: skip


def check_writable(directory: Path) -> None:
    """Raise `OutputError` if nothing can be written into a directory that is there."""
    if not os.access(directory, os.W_OK):
        raise OutputError(
            directory, "cannot be written into", fix="Choose a directory that you may write to."
        )


def check_free_space(directory: Path, needed_bytes: int) -> None:
    """Raise `OutputError` if the file system of `directory` has too little room."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise OutputError(
            directory,
            "not enough free disk space",
            expected=f"{readable_size(needed_bytes)} free",
            found=readable_size(free),
            fix="Free some room, or choose another disk.",
        )


def readable_size(count: int) -> str:
    """Bytes as a person reads them: `1.5 GiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _is_ours(directory: Path) -> bool:
    for name in MANIFESTS:
        path = directory / name
        if path.is_file():
            with path.open("rb") as stream:
                return SCHEMA_MARK in stream.read(4096)
    return False


def _make_sibling(target: Path) -> Path:
    token = secrets.token_hex(4)
    temporary = target.parent / STALE_FORM.format(name=target.name, token=token)
    try:
        temporary.mkdir()
    except OSError as error:
        raise output_error(target.parent, error) from error
    return temporary


def lock_directory(directory: Path) -> int | None:
    """Hold a lock on the directory while its writer lives; None where there are no such locks.

    Raises:
        BlockingIOError: If another writer holds it.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle


def remove_stale(target: Path) -> None:
    """Remove what killed writers of the same target left behind: old, and locked by nobody.

    What one was killed over that had moved the old directory away, and not yet the new one into its
    place, gets its name back.
    """
    for sibling in _siblings(target, OLD_FORM):
        with suppress(FileNotFoundError):  # another writer was here first
            _put_back(sibling, target)
    for sibling in _siblings(target, STALE_FORM):
        with suppress(FileNotFoundError):
            _clear_away(sibling)


def _put_back(old: Path, target: Path) -> None:
    if time.time() - old.stat().st_ctime < STALE_AFTER_SECONDS:
        return
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.rename(target)


def _clear_away(stale: Path) -> None:
    if time.time() - stale.stat().st_mtime < STALE_AFTER_SECONDS:
        return
    if stale.is_file():
        stale.unlink(missing_ok=True)
        return
    try:
        lock = lock_directory(stale)
    except BlockingIOError:
        return
    if lock is not None:
        shutil.rmtree(stale, ignore_errors=True)
        os.close(lock)


def _siblings(target: Path, form: str) -> list[Path]:
    """What lies beside a target under a name of that form."""
    prefix, suffix = form.format(name=target.name, token="|").split("|")
    length = len(prefix) + 8 + len(suffix)
    if not target.parent.is_dir():
        return []
    return [
        sibling
        for sibling in target.parent.iterdir()
        if sibling.name.startswith(prefix) and sibling.name.endswith(suffix)
        if len(sibling.name) == length and not sibling.is_symlink()
    ]


def sync_tree(root: Path) -> None:
    """Flush a directory and all that is in it to the disk."""
    for directory, _, files in os.walk(root, topdown=False):
        for name in files:
            sync(Path(directory, name))
        sync(Path(directory))


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle on a directory to flush
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move_into_place(temporary: Path, target: Path) -> None:
    """Give a directory its final name; what bore it before is removed.

    At every moment the name is that of the old one or the new one, whole, where the system can let
    two names change places (Linux, but for a few file systems). Elsewhere there is a moment without
    either; `remove_stale` brings back the old one of a writer that was killed in it.
    """
    old = None
    if not target.exists():
        temporary.rename(target)
    elif exchange(temporary, target):
        old = temporary
    else:
        old = target.with_name(OLD_FORM.format(name=target.name, token=secrets.token_hex(4)))
        target.rename(old)
        try:
            temporary.rename(target)
        except BaseException:
            old.rename(target)
            raise
    sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places at once; False where the system has no such thing."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an old C library
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_AT_CWD, names[0], _AT_CWD, names[1], ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@contextmanager
def stated_failures(target: Path) -> Iterator[None]:
    """Let what the operating system refuses in the block be a failure to write `target`."""
    try:
        yield
    except OSError as error:
        stated = as_output_error(
            error, target, target, None, left="the same command goes on with what is finished"
        )
        if stated is None:
            raise
        raise stated from error


def as_output_error(
    error: BaseException,
    target: Path,
    temporary: Path,
    needed_bytes: int | None,
    left: str = "nothing was left behind",
) -> OutputError | None:
    """The stated failure behind an error of the operating system, if it is about the output."""
    number = _number(error)
    if number in _FULL:
        return output_error(target, error, needed_bytes=needed_bytes, left=left)
    if isinstance(error, OSError) and error.filename is not None:
        concerned = [os.fsdecode(name) for name in (error.filename, error.filename2) if name]
        about_us = any(name.startswith((str(temporary), str(target))) for name in concerned)
        return output_error(target, error, left=left) if about_us else None
    # Without a name it is of a file that was open already: the ones that are written.
    return output_error(target, error, left=left) if number in _REFUSED else None


def output_error(
    target: Path, error: BaseException, *, needed_bytes: int | None = None, left: str | None = None
) -> OutputError:
    """What a person should know when the operating system does not let `target` be written.

    Args:
        target: What was to be written.
        error: An `OSError`, or one of a library that reports one.
        needed_bytes: What it takes, if known.
        left: What became of it, as a clause.
    """
    number = _number(error)
    behind = "" if left is None else f"; {left}"
    if number in _FULL:
        expected = None if needed_bytes is None else f"{readable_size(needed_bytes)} in all"
        return OutputError(
            target,
            "the disk is full",
            expected=expected,
            found=f"{readable_size(_free(target))} free",
            fix=f"Free some room, or choose another disk{behind}.",
        )
    reason = str(error) if number is None else os.strerror(number)
    return OutputError(
        target,
        f"cannot be written ({reason})",
        fix=f"Choose a directory that exists and that you may write to{behind}.",
    )


def _number(error: BaseException) -> int | None:
    """The operating system's number of an error; the safetensors library reports it as text."""
    if isinstance(error, OSError):
        return error.errno
    reported = _REPORTED.search(str(error))
    return int(reported[1]) if reported else None


def _free(path: Path) -> int:
    """Bytes free where a file is, or would be."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(there).free
