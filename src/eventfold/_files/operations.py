"""The file operations that change something, or make a change durable.

All other modules call them as `operations.NAME`, so that a test can replace an operation to count its calls, make it
fail or suspend it. Reading uses `os` directly.

Promise: a file has the new content that `replace_file` writes, or its previous content, even after a crash.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WRITE_SIZE = 1024**3  # Linux writes no more than 2 GiB in one call
# Earlier versions used the process id and a serial number instead of 16 hex digits, and neither for the archive.
_TEMPORARY = re.compile(r"\..+\.(?:[0-9a-f]{16}|\d+\.\d+|zst)\.tmp")
# Seconds since the last write after which a temporary file counts as abandoned by a process that was killed.
LEFTOVER_AGE = 3600.0


def open_file(path: Path, flags: int) -> int:
    """A new descriptor; `flags` as for `os.open`."""
    return os.open(path, flags | os.O_CLOEXEC, 0o666)


def create_file(path: Path) -> int:
    """A new descriptor of a new file. Raises `FileExistsError`, even if the path is a symbolic link to nothing."""
    return open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)


def open_regular(path: Path, flags: int) -> int:
    """A new descriptor of a regular file; raises `OSError` for anything else. Never blocks."""
    return _regular(path, open_file(path, flags | os.O_NONBLOCK))


def open_to_read(path: Path) -> int:
    """A new descriptor of a regular file, for reading only: see `open_regular`."""
    return _regular(path, os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))


def _regular(path: Path, fd: int) -> int:
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    number, text = (errno.EISDIR, "Is a directory") if stat.S_ISDIR(mode) else (errno.EINVAL, "not a regular file")
    raise OSError(number, text, os.fspath(path))


def temporary_path(path: Path) -> Path:
    """A random path in the same directory, for a file that will be renamed to `path`.

    A process id with a serial number would not be unique: both start over with each start of a container.
    """
    return path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")


def write(fd: int, data: bytes, position: int) -> None:
    """Writes all of `data` at `position` (bytes in the file). If it raises `OSError`, a part may have been written."""
    if len(data) > _WRITE_SIZE:
        for start in range(0, len(data), _WRITE_SIZE):
            write(fd, data[start : start + _WRITE_SIZE], position + start)
        return
    written = os.pwrite(fd, data, position)
    if written != len(data):
        raise OSError(errno.ENOSPC, f"short write: {written} of {len(data)} bytes")


def sync(fd: int) -> None:
    """Syncs the file: what was written to it is on disk when this returns."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, where fsync leaves data in the drive's cache
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(fd)


def truncate(fd: int, size: int) -> None:
    os.ftruncate(fd, size)


def rename(source: Path, target: Path) -> None:
    os.rename(source, target)


def unlink(path: Path) -> None:
    os.unlink(path)


def discard(path: Path) -> None:
    """Removes a file, and ignores errors."""
    try:
        unlink(path)
    except OSError:
        pass


def make_dir(path: Path) -> None:
    """Creates the directory and its missing parents, durably; does nothing if it exists."""
    if path.is_dir():
        return
    if path.parent != path:
        make_dir(path.parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    sync_dir(path.parent)


def sync_dir(path: Path) -> None:
    """Syncs the directory: the names in it are on disk when this returns."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomically_created(path: Path) -> Iterator[int]:
    """A descriptor of a temporary file, which is renamed to `path` if the block succeeds and discarded otherwise.

    The block must sync the file. The rename is durable once the directory has been synced too.
    """
    temporary = temporary_path(path)
    fd = create_file(temporary)
    try:
        try:
            yield fd
        finally:
            os.close(fd)
        rename(temporary, path)
    except BaseException:
        discard(temporary)
        raise


def replace_file(path: Path, data: bytes) -> None:
    """Replaces the file's content atomically and durably."""
    make_dir(path.parent)
    with atomically_created(path) as fd:
        write(fd, data, 0)
        sync(fd)
    sync_dir(path.parent)


def discard_leftovers(directory: Path) -> None:
    """Removes temporary files that are an hour older than the last change of the directory.

    It is impossible to find out whether the process that created one is alive: it may be in another pid namespace. The
    clock is not used, since it may jump while a process is writing such a file.
    """
    try:
        names = os.listdir(directory)
        changed_at = os.stat(directory).st_mtime
    except OSError:
        return
    for name in names:
        if _TEMPORARY.fullmatch(name):
            try:
                age = changed_at - os.lstat(directory / name).st_mtime
            except OSError:
                continue
            if age > LEFTOVER_AGE:
                discard(directory / name)


def lock(fd: int) -> bool:
    """Takes the exclusive flock without waiting; false if it is taken. Closing the descriptor releases it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_shared(fd: int) -> bool:
    """Takes the shared flock, or downgrades an exclusive one, without waiting; false if the exclusive one is taken."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(fd: int) -> None:
    """Takes the exclusive flock; waits as long as necessary."""
    fcntl.flock(fd, fcntl.LOCK_EX)


def lock_holder(fd: int) -> int | None:
    """The process that holds the flock on this file, if the system reports it (Linux, same pid namespace)."""
    status = os.fstat(fd)
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        with open("/proc/locks", encoding="ascii") as locks:
            for line in locks:
                words = line.split()
                if len(words) >= 6 and words[1] == "FLOCK" and words[5] == file and int(words[4]) > 0:
                    return int(words[4])
    except (OSError, ValueError):
        pass
    return None


def unlock(fd: int) -> None:
    """Releases the flock, even if a forked child shares it. Don't call it in the child: it releases the parent's."""
    try:
        fcntl.flock(fd, fcntl.LOCK_UN)
    except OSError:
        pass  # closing the descriptor releases the flock too, unless a child shares it


def close_locked(fd: int) -> None:
    """Releases the flock and closes the file. Closing alone is not enough if a forked child shares the flock."""
    unlock(fd)
    os.close(fd)


def write_mapped(memory: mmap.mmap, data: bytes, position: int) -> None:
    """Writes to a mapped file, without a system call. If the process is killed meanwhile, a part may be written."""
    memory[position : position + len(data)] = data


def check_space(fd: int, size: int) -> None:
    """Raises `OSError` if the file system has less than `size` bytes left."""
    stat = os.fstatvfs(fd)
    if stat.f_bavail * stat.f_frsize < size:
        raise OSError(errno.ENOSPC, f"less than {size} bytes are left on the device")
