"""The commands on a log that another engine keeps: what works on any log works there, and the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.commands import numbers, run
from tests.jetstream.servers import Servers


@pytest.fixture
def address(nats_server: Servers) -> str:
    """That of a log which is not there yet."""
    return f"{nats_server.addresses[0]}/commands"


def test_the_commands_work_on_another_engine_or_say_why_not(address: str, tmp_path: Path) -> None:
    run("append", address, input="".join(f'{{"type":"added","data":{{"n":{n}}}}}\n' for n in range(3)))

    shown = run("cat", address, "--last", 2).stdout
    assert numbers(shown) == [1, 2]
    report = json.loads(run("verify", address, "--json").stdout)
    assert (report["events"], report["size"], report["problems"]) == (3, len(run("export", address).stdout), [])
    assert json.loads(run("info", address, "--json").stdout)["files"] is None
    for refused in (["rotate"], ["repair"], ["backup", tmp_path / "copy"], ["index", "build"]):
        at = [refused[0], address, *refused[1:]] if refused[0] != "index" else [*refused, address]
        error = run(*at, status=1).stderr
        assert error.count("\n") == 1
        assert address in error
