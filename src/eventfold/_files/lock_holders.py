"""Who holds a flock on a file, for messages. Only Linux tells."""

from __future__ import annotations

import os


def lock_holders(fd: int) -> list[int]:
    """The ids of the processes that hold a flock on a file, as far as the system tells: none of other containers."""
    try:
        with open("/proc/locks", encoding="ascii") as file:
            table = file.read()
        stat = os.fstat(fd)
    except (OSError, UnicodeDecodeError):
        return []
    name = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    found = set()
    for line in table.splitlines():
        # 1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF; with "->" before FLOCK, one that waits
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == name and fields[4].isdigit() and fields[4] != "0":
            found.add(int(fields[4]))
    return sorted(found)
