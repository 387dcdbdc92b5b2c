"""What appears whole or not at all: a temporary sibling, renamed into place."""

from __future__ import annotations

import errno
import os
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
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


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
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except OSError as error:
        raise OutputError(
            target,
            f"cannot be written ({error.strerror})",
            fix="Name a file in a directory that exists and that you may write to.",
        ) from error
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
        raise OutputError(
            target.parent,
            f"cannot be written to ({error.strerror})",
            fix="Choose a directory you may write to.",
        ) from error
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
    """Remove what killed writers of the same directory left behind: old, and locked by nobody."""
    prefix, suffix = STALE_FORM.format(name=target.name, token="|").split("|")
    if not target.parent.is_dir():
        return
    for sibling in target.parent.iterdir():
        name = sibling.name
        if not (name.startswith(prefix) and name.endswith(suffix)) or sibling.is_symlink():
            continue
        if len(name) != len(prefix) + 8 + len(suffix):
            continue
        if time.time() - sibling.stat().st_mtime < STALE_AFTER_SECONDS:
            continue
        try:
            lock = lock_directory(sibling)
        except BlockingIOError:
            continue
        if lock is not None:
            shutil.rmtree(sibling, ignore_errors=True)
            os.close(lock)


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
    """Give a directory its final name; what bore it before is removed."""
    if not target.exists():
        temporary.rename(target)
    else:
        # Two renames, because one cannot replace a directory with content; the old one comes back
        # if the second fails.
        old = temporary.with_name(temporary.name.removesuffix(".partial") + ".old")
        target.rename(old)
        try:
            temporary.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync(target.parent)


def as_output_error(
    error: BaseException,
    target: Path,
    temporary: Path,
    needed_bytes: int | None,
    left: str = "nothing was left behind",
) -> OutputError | None:
    """The stated failure behind an error of the operating system, if it is about the output."""
    # The safetensors library reports the operating system's errors as text.
    if (isinstance(error, OSError) and error.errno in _FULL) or "(os error 28)" in str(error):
        return OutputError(
            target,
            "the disk is full",
            expected=None if needed_bytes is None else f"{readable_size(needed_bytes)} in all",
            found=f"{readable_size(shutil.disk_usage(target.parent).free)} free",
            fix=f"Free some room, or choose another disk; {left}.",
        )
    if isinstance(error, OSError) and error.errno in _REFUSED:
        concerned = str(error.filename or "")
        if concerned.startswith((str(temporary), str(target))):
            return OutputError(
                target,
                f"cannot be written ({error.strerror})",
                fix="Choose a directory you may write to.",
            )
    return None
