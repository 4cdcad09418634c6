"""Fixtures: small file systems to fill, make read-only, or cut off while a process writes to them.

They need root, and ext4 also needs loop devices and `mkfs.ext4`. If a machine lacks any of these, the test is skipped,
with the reason; failures after a file system was mounted fail the test.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_MIB = 2**20
_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_WITHOUT_FLUSH = 2  # its argument: nothing more is written, not even the journal
_SET_FLAGS, _IMMUTABLE, _EXTENTS = 0x40086602, 0x10, 0x80000  # FS_IOC_SETFLAGS, and two of its flags
_PATHS = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
_BALLAST = "ballast"


class Disk:
    """A file system at `path`, mounted until it is unmounted."""

    def __init__(self, path: Path, *mount: str) -> None:
        self.path = path
        self._mount = mount

    def mount(self) -> None:
        """Mounts it again, with its content."""
        _run("mount", *self._mount, str(self.path))

    def unmount(self) -> None:
        """Unmounts it; fails if a file on it is still open. The kernel takes a moment to clean up a killed process."""
        for _ in range(500):
            try:
                _run("umount", str(self.path))
            except OSError as error:
                if "busy" not in str(error):
                    raise
                time.sleep(0.02)
            else:
                return
        raise OSError(f"{self.path} is in use")

    def make_read_only(self) -> None:
        """Makes it read-only; nobody may have a file open for writing."""
        _run("mount", "-o", "remount,ro", str(self.path))

    def fill(self, left: int = 0) -> None:
        """Fills it completely, or leaves about `left` bytes, rounded down to complete blocks."""
        ballast = os.open(self.path / _BALLAST, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (65536, 4096, 512, 1):
                try:
                    while os.write(ballast, b"x" * size):
                        os.fsync(ballast)  # Data that ext4 still holds back in memory takes up no space yet.
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
            if left:
                os.ftruncate(ballast, max(0, os.fstat(ballast).st_size - left))
                os.fsync(ballast)
        finally:
            os.close(ballast)

    def free(self) -> None:
        """Frees the space that `fill` took."""
        (self.path / _BALLAST).unlink()

    def cut_power(self) -> None:
        """Cuts the power: nothing reaches the disk any more, and unsynced data is lost. Then it is mounted again."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _WITHOUT_FLUSH))
        finally:
            os.close(fd)


class Ext4(Disk):
    """An ext4 in a file."""

    def __init__(self, image: Path, path: Path) -> None:
        # Neither option may help a program that forgets a sync: ext4 would write out files that are renamed over
        # others, and its journal every five seconds.
        super().__init__(path, "-o", "loop,noauto_da_alloc,commit=300", str(image))
        self._image = image

    @property
    def needs_replay(self) -> bool:
        """Whether its journal must be replayed before it is mounted, as after a power cut."""
        with self._image.open("rb") as image:
            image.seek(1024 + 0x60)
            return bool(struct.unpack("<I", image.read(4))[0] & 4)

    @staticmethod
    def protect(path: Path, protected: bool) -> None:
        """Sets whether nobody may write to the file, not even root or a process that has it open."""
        fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SET_FLAGS, struct.pack("I", _EXTENTS | (_IMMUTABLE if protected else 0)))
        finally:
            os.close(fd)


def _run(*command: str) -> None:
    program = shutil.which(command[0], path=_PATHS)
    if program is None:
        raise OSError(f"there is no {command[0]}")
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip()}")


def _reason(error: OSError) -> str:
    """Returns the last part of the first line: without the path, so that all skipped tests are listed as one."""
    return str(error).splitlines()[0].split(": ")[-1]


@contextmanager
def _mounted(disk: Disk) -> Iterator[None]:
    if os.geteuid():
        pytest.skip("mounting needs root")
    try:
        disk.path.mkdir()
        disk.mount()
    except OSError as error:
        pytest.skip(f"nothing can be mounted here: {_reason(error)}")
    try:
        yield
    finally:
        if os.path.ismount(disk.path):
            disk.unmount()


@contextmanager
def tmpfs(path: Path, size: int = _MIB) -> Iterator[Disk]:
    """A tmpfs of `size` bytes."""
    disk = Disk(path, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    with _mounted(disk):
        yield disk


@contextmanager
def ext4(path: Path, size: int = 32 * _MIB) -> Iterator[Ext4]:
    """An ext4 of `size` bytes, with a journal, in a file beside `path`."""
    image = path.with_name(f"{path.name}.image")
    with image.open("wb") as file:
        file.truncate(size)
    try:
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-J", "size=1", str(image))
    except OSError as error:
        pytest.skip(f"there can be no ext4 here: {_reason(error)}")
    disk = Ext4(image, path)
    with _mounted(disk):
        yield disk
