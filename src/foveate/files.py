"""Files: written whole or not at all, at the very place that was named; YAML read without its traps."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
from pathlib import Path
from typing import Any

import yaml

__all__ = ["YamlError", "check_writable", "parse_yaml", "read_yaml", "write_whole"]

_LARGEST, _DEEPEST = 1 << 20, 20
"""Characters and levels of a YAML text."""


class YamlError(ValueError):
    """A text is no YAML, or more of it than a person writes; one short line."""


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """What a YAML file holds, see `parse_yaml`. Raises `YamlError` also if it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_LARGEST + 1)
    except OSError as error:
        raise YamlError(f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # also a NUL byte in the path
        raise YamlError("cannot be read (not UTF-8 text)") from error
    return parse_yaml(text)


def parse_yaml(text: str) -> Any:
    """Plain values, lists and mappings of a YAML text. Raises `YamlError`.

    Aliases are refused, with which a few lines stand for billions of values; so is what is too long or nested too
    deeply.
    """
    if len(text) > _LARGEST:
        raise YamlError(f"too large: more than {_LARGEST} characters")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # unlike loading, this does not recurse
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise YamlError(f"nested too deeply: more than {_DEEPEST} levels")
            if isinstance(event, yaml.AliasEvent):
                raise YamlError(f"holds an alias (*{event.anchor[:20]}), line {event.start_mark.line + 1}")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = str(getattr(error, "problem", None) or "cannot be parsed")[:100]
        raise YamlError(f"not YAML ({reason}{'' if mark is None else f', line {mark.line + 1}'})") from error
    except YamlError:
        raise
    except ValueError as error:  # a date that there is not, a number of thousands of digits
        raise YamlError(f"not YAML ({str(error)[:100]})") from error


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file; a reader sees the old content or the new one. Missing folders are made.

    A symbolic link stays, and the file it points to is written. An existing file keeps its mode and owner, a new one
    minds the umask. Devices, named pipes and `/dev/stdout` are written to, never replaced. Only a file that cannot be
    replaced by one like it (a mount of its own, a folder that takes no new file) is written in place.

    Args:
        path: of the file.
        content: bytes, or text, which is written as UTF-8.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    data = content.encode() if isinstance(content, str) else content
    target, old = _target(path)
    if (old is not None and not stat.S_ISREG(old.st_mode)) or isinstance(target, int):
        _write_through(target, data)
        return
    try:
        _replace(target, old, data)
    except OSError as error:
        if old is None or error.errno not in (errno.EACCES, errno.EPERM, errno.EBUSY):
            raise
        _write_in_place(target, data)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise the `OSError` of a `write_whole` that cannot work, as far as it can be foreseen. Leaves nothing behind."""
    target, old = _target(path)
    if old is None and isinstance(target, Path):
        folder = next(parent for parent in target.parents if parent.exists())
        handle, trial = _temporary(folder, None)
        os.close(handle)
        trial.unlink()


def _target(path: str | os.PathLike[str]) -> tuple[Path | int, os.stat_result | None]:
    """Where a path leads, links followed: a file, or a descriptor of this process; and what is there already."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return Path(os.path.realpath(path)), None
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder; give the name of a file", os.fspath(path))
    descriptor = _descriptor(Path(path))
    if descriptor is not None:
        return descriptor, found
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
    return Path(os.path.realpath(path)) if stat.S_ISREG(found.st_mode) else Path(path), found


def _descriptor(path: Path) -> int | None:
    """N of a path that leads to /proc/self/fd/N, as /dev/stdout does."""
    own = {os.path.realpath(folder) for folder in ("/proc/self/fd", "/proc/thread-self/fd", "/dev/fd")}
    while True:  # ends: a loop of links has no stat
        folder = os.path.realpath(path.parent)
        if folder in own and path.name.isdigit():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = Path(folder, os.readlink(path))


def _write_through(target: Path | int, data: bytes) -> None:
    if isinstance(target, int):
        sys.stdout.flush()  # what was said before comes before
        handle = os.dup(target)  # opened anew, it would begin at the start of a file, and a socket cannot be opened
    else:
        handle = os.open(target, os.O_WRONLY)
    with open(handle, "wb") as file:
        file.write(data)


def _replace(target: Path, old: os.stat_result | None, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = _temporary(target.parent, old)
    try:
        with open(handle, "wb") as file:
            file.write(data)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _temporary(folder: Path, like: os.stat_result | None) -> tuple[int, Path]:
    """A new file, open for writing, with owner and mode of another, or as the umask has it."""
    path = folder / f".foveate-{secrets.token_hex(8)}"  # not after the target: its name may be of the greatest length
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if like is None else 0o600)
    if like is not None:
        try:
            made = os.fstat(handle)
            if (made.st_uid, made.st_gid) != (like.st_uid, like.st_gid):
                os.chown(path, like.st_uid, like.st_gid)
            path.chmod(stat.S_IMODE(like.st_mode))
        except OSError:
            os.close(handle)
            path.unlink()
            raise
    return handle, path


def _write_in_place(target: Path, data: bytes) -> None:
    with open(os.open(target, os.O_WRONLY), "wb") as file:
        if data and hasattr(os, "posix_fallocate"):
            with contextlib.suppress(NotImplementedError):
                os.posix_fallocate(file.fileno(), 0, len(data))  # a full disk shows before anything is lost
        file.write(data)
        file.truncate()
