"""The one place for file operations that change something.

Every operation that changes a file or makes a change durable is a function here, called as `operations.NAME`, so that a
test can replace it to count the call, make it fail or suspend it. Reading uses `os` directly.

Promise: what `replace_file` writes is there completely or not at all, whatever happens meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WRITE_SIZE = 1024**3  # Linux writes no more than 2 GiB in one call
# Earlier versions used the process id and a serial number instead, and nothing for the archive.
_TEMPORARY = re.compile(r"\..+\.(?:[0-9a-f]{16}|\d+\.\d+|zst)\.tmp")
# Seconds without a write after which a temporary file is abandoned: its process was killed.
LEFTOVER_AGE = 3600.0


def open_file(path: Path, flags: int) -> int:
    """A new descriptor; `flags` as for `os.open`."""
    return os.open(path, flags | os.O_CLOEXEC, 0o666)


def create_file(path: Path) -> int:
    """A new descriptor of a file that must not exist yet, not even as a link."""
    return open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)


def open_regular(path: Path, flags: int) -> int:
    """A new descriptor of a regular file; anything else raises `OSError`, and never blocks."""
    return _regular(path, open_file(path, flags | os.O_NONBLOCK))


def open_to_read(path: Path) -> int:
    """The same, for reading only."""
    return _regular(path, os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))


def _regular(path: Path, fd: int) -> int:
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    number, text = (errno.EISDIR, "Is a directory") if stat.S_ISDIR(mode) else (errno.EINVAL, "not a regular file")
    raise OSError(number, text, os.fspath(path))


def read_file(path: Path, most: int) -> bytes:
    """The content of a regular file; `OSError` for more than `most` bytes."""
    fd = open_to_read(path)
    with os.fdopen(fd, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"more than {most} bytes", os.fspath(path))
    return data


def temporary_path(path: Path) -> Path:
    """A name beside `path` that nobody else uses or guesses, for the file that will replace it.

    Process ids and serial numbers would not do: both start over with each start of a container.
    """
    return path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")


def write(fd: int, data: bytes, position: int) -> None:
    """Writes all of `data` at `position` (bytes in the file), or raises `OSError`; then a part of it may be there."""
    for start in range(0, len(data), _WRITE_SIZE):
        chunk = data[start : start + _WRITE_SIZE] if len(data) > _WRITE_SIZE else data
        written = os.pwrite(fd, chunk, position + start)
        if written != len(chunk):
            raise OSError(errno.ENOSPC, f"short write: {start + written} of {len(data)} bytes")


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
    """Removes a file that nobody needs, if that is possible."""
    try:
        unlink(path)
    except OSError:
        pass


def make_dir(path: Path) -> None:
    """Creates the directory and those above it, durably; does nothing if it exists."""
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
    """Removes the temporary files to which nothing was written for an hour: their process was killed.

    Whether that process is alive can't be found out, since it may be in another pid namespace.
    """
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        if _TEMPORARY.fullmatch(name):
            try:
                age = time.time() - os.lstat(directory / name).st_mtime
            except OSError:
                continue
            if age > LEFTOVER_AGE:
                discard(directory / name)


def lock(fd: int) -> bool:
    """Takes the exclusive flock without waiting; false if another holds it. Closing the descriptor releases it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_shared(fd: int) -> bool:
    """Takes the shared flock, or downgrades an exclusive one, without waiting; false if it is refused."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(fd: int) -> None:
    """Takes the exclusive flock, and waits for it as long as necessary."""
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
    """Releases the flock, even if a forked child has the descriptor too. A child would release its parent's."""
    try:
        fcntl.flock(fd, fcntl.LOCK_UN)
    except OSError:
        pass  # closing the descriptor does it too, except for the child


def close_locked(fd: int) -> None:
    """Releases the flock and closes the file; closing is not enough if a child has just inherited the descriptor."""
    unlock(fd)
    os.close(fd)


def write_mapped(memory: mmap.mmap, data: bytes, position: int) -> None:
    """Changes a mapped file, without a system call; a process that is killed meanwhile may have changed part of it."""
    memory[position : position + len(data)] = data


def check_space(fd: int, size: int) -> None:
    """Raises `OSError` if the file system has less than `size` bytes left."""
    stat = os.fstatvfs(fd)
    if stat.f_bavail * stat.f_frsize < size:
        raise OSError(errno.ENOSPC, f"no {size} bytes are left on the device")
