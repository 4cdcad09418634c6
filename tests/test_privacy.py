"""`eventfold.privacy`: what can be read with a key, what can't be read without it, and what is refused."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import signal
import stat
import subprocess
import sys
from datetime import date
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from eventfold import Event, EventfoldError, EventLog, View, privacy
from eventfold.privacy import DirectoryKeys, Forgotten, Privacy, ProtectedDataError

ADA = {"name": "Ada", "address": {"city": "London", "tags": [1, None, "é"]}, "plan": "pro"}


@pytest.fixture
def keys_dir(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def keeper(keys_dir: Path) -> Privacy:
    return Privacy(DirectoryKeys(keys_dir))


async def protected(keeper: Privacy, subject: str = "customer-7") -> dict[str, Any]:
    return await keeper.protect(ADA, subject, ["name", "address"])


def key_file(keys_dir: Path) -> Path:
    (found,) = keys_dir.glob("*.json")
    return found


async def test_what_was_protected_is_revealed_with_the_key(keeper: Privacy) -> None:
    """Any JSON value can be protected, and the other fields stay as they are."""
    original = copy.deepcopy(ADA)
    data = await protected(keeper)

    assert original == ADA
    assert data["plan"] == "pro"
    assert await keeper.reveal(data) == ADA


async def test_the_log_and_its_archive_hold_no_plain_text(keeper: Privacy, tmp_path: Path) -> None:
    """No plain text is written at any moment."""
    async with EventLog.open(tmp_path / "data") as log:
        await log.append(Event("joined", await protected(keeper)))
        written = log.log_path.read_bytes()
        await log.rotate()
        (record,) = [record async for record in log.read_full()]

    assert b"Ada" not in written
    assert b"London" not in written
    assert await keeper.reveal(record.event.data) == ADA


async def test_the_same_value_is_encrypted_differently_each_time(keeper: Privacy) -> None:
    """Nobody who looks at the log can see that two values are equal."""
    assert (await protected(keeper))["name"] != (await protected(keeper))["name"]


async def test_a_forgotten_subject_leaves_placeholders(keeper: Privacy) -> None:
    """Values of other subjects are still revealed."""
    ada, bob = await protected(keeper, "ada"), await protected(keeper, "bob")
    await keeper.forget("ada")

    revealed = await keeper.reveal([ada, bob])
    assert revealed == [{**ADA, "name": Forgotten("ada"), "address": Forgotten("ada")}, ADA]
    assert str(revealed[0]["name"]) == "[forgotten]"
    assert not revealed[0]["name"]


async def test_a_forgotten_subject_is_forgotten_by_all_processes_at_once(keeper: Privacy, keys_dir: Path) -> None:
    """Other processes keep no keys in memory."""
    data = await protected(keeper)
    other = Privacy(DirectoryKeys(keys_dir))
    assert await other.reveal(data) == ADA
    await keeper.forget("customer-7")

    assert (await other.reveal(data))["name"] == Forgotten("customer-7")


async def test_the_key_is_in_no_file_once_it_is_forgotten(keeper: Privacy, keys_dir: Path) -> None:
    """Only the id of the key remains."""
    await protected(keeper)
    secret = json.loads(key_file(keys_dir).read_text())["key"]["secret"]
    await keeper.forget("customer-7")

    assert all(secret not in path.read_text() for path in keys_dir.iterdir())


async def test_forgetting_is_durable_before_it_returns(
    keeper: Privacy, keys_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is synced and renamed, and then its directory is synced."""
    await protected(keeper)
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        calls.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        sync(fd)

    def replaced(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(privacy.os, "fsync", synced)
    monkeypatch.setattr(privacy.os, "replace", replaced)
    await keeper.forget("customer-7")

    assert calls == ["file", "replace", "directory"]


async def test_a_subject_that_comes_back_gets_a_new_key(keeper: Privacy) -> None:
    """Values that were forgotten stay unreadable."""
    before = await protected(keeper)
    await keeper.forget("customer-7")
    after = await protected(keeper)

    assert (await keeper.reveal(before))["name"] == Forgotten("customer-7")
    assert await keeper.reveal(after) == ADA


async def test_forgetting_twice_or_an_unknown_subject_does_nothing(keeper: Privacy, keys_dir: Path) -> None:
    """No file is created for an unknown subject."""
    await keeper.forget("nobody")
    assert not list(keys_dir.glob("*.json"))
    await protected(keeper)
    await keeper.forget("customer-7")
    once = key_file(keys_dir).read_bytes()
    await keeper.forget("customer-7")

    assert key_file(keys_dir).read_bytes() == once


async def test_a_store_without_the_key_gives_placeholders(keeper: Privacy, tmp_path: Path) -> None:
    """The result is the same as after the loss of a key."""
    data = await protected(keeper)

    assert (await Privacy(DirectoryKeys(tmp_path / "empty")).reveal(data))["name"] == Forgotten("customer-7")


async def test_another_key_of_the_subject_is_an_error(keeper: Privacy, tmp_path: Path) -> None:
    """A wrong store is never mistaken for one that has forgotten the subject."""
    data = await protected(keeper)
    other = Privacy(DirectoryKeys(tmp_path / "others"))
    await protected(other)

    with pytest.raises(ProtectedDataError, match=r"customer-7.*'name'.*is it the wrong store"):
        await other.reveal({"name": data["name"]})


async def test_a_key_with_the_right_id_and_other_bytes_is_an_error(keeper: Privacy, keys_dir: Path) -> None:
    """A value that fails authentication is never shown."""
    data = await protected(keeper)
    entry = json.loads(key_file(keys_dir).read_text())
    entry["key"]["secret"] = "A" * 43 + "="
    key_file(keys_dir).write_text(json.dumps(entry))

    with pytest.raises(ProtectedDataError, match="can't be decrypted"):
        await keeper.reveal(data)


def flipped(text: str, index: int) -> str:
    return text[:index] + ("A" if text[index] != "A" else "B") + text[index + 1 :]


@pytest.mark.parametrize("index", [0, 5, 16, 20, -5], ids=lambda index: f"character {index}")
async def test_a_changed_value_is_an_error(keeper: Privacy, index: int) -> None:
    """The change may be in the nonce, in the ciphertext or in the tag."""
    data = await protected(keeper)
    data["name"]["$protected"] = flipped(data["name"]["$protected"], index % len(data["name"]["$protected"]))

    with pytest.raises(ProtectedDataError, match="can't be decrypted"):
        await keeper.reveal(data)


@pytest.mark.parametrize(
    "change",
    [{"$protected": ""}, {"$protected": "é"}, {"$protected": 5}, {"subject": None}, {"key": []}, {"more": 1}],
    ids=str,
)
async def test_an_invalid_protected_value_is_an_error(keeper: Privacy, change: dict[str, Any]) -> None:
    """The error is the documented one, and the value is not shown."""
    data = await protected(keeper)
    data["name"] |= change

    with pytest.raises(ProtectedDataError):
        await keeper.reveal(data)
    assert issubclass(ProtectedDataError, EventfoldError)


async def test_a_value_that_was_moved_to_another_field_is_an_error(keeper: Privacy) -> None:
    """The field's name is authenticated."""
    data = await protected(keeper)

    with pytest.raises(ProtectedDataError, match="'plan'"):
        await keeper.reveal({"plan": data["name"]})


async def test_a_value_that_was_given_to_another_subject_is_an_error(keeper: Privacy, keys_dir: Path) -> None:
    """The subject is authenticated, even if two subjects have the same key."""
    ada = await keeper.protect({"name": "Ada"}, "ada", ["name"])
    file = key_file(keys_dir)
    bob = await keeper.protect({"name": "Bob"}, "bob", ["name"])
    (other,) = set(keys_dir.glob("*.json")) - {file}
    other.write_bytes(file.read_bytes())
    ada["name"]["subject"] = bob["name"]["subject"]

    with pytest.raises(ProtectedDataError, match="'bob'"):
        await keeper.reveal(ada)


async def test_a_state_that_keeps_the_field_names_can_be_revealed(keeper: Privacy) -> None:
    """Tested at any depth, and inside lists."""
    data = await protected(keeper)

    assert await keeper.reveal({"people": [{"id": 7, "name": data["name"]}]}) == {"people": [{"id": 7, "name": "Ada"}]}
    assert await keeper.reveal({"name": [data["name"], "plain"]}) == {"name": ["Ada", "plain"]}
    assert await keeper.reveal(data["name"], "name") == "Ada"


async def test_a_view_keeps_protected_values_also_in_its_snapshot(keeper: Privacy, tmp_path: Path) -> None:
    """Forgetting a subject therefore erases the values in snapshots as well."""

    def names(state: list[Any], event: Event) -> list[Any]:
        return [*state, event.data["name"]]

    async with EventLog.open(tmp_path / "data", views=[View("names", names, list)]) as log:
        await log.append(Event("joined", await protected(keeper)))
        await log.refresh_all()
        views_dir = log.views_dir
    async with EventLog.open(tmp_path / "data", views=[View("names", names, list)]) as log:
        assert await keeper.reveal(log.view("names"), "name") == ["Ada"]
        await keeper.forget("customer-7")
        assert await keeper.reveal(log.view("names"), "name") == [Forgotten("customer-7")]

    assert all(b"Ada" not in path.read_bytes() for path in views_dir.iterdir())


async def test_a_missing_field_is_refused(keeper: Privacy, keys_dir: Path) -> None:
    """A misspelt name would leave the value readable. No key is created."""
    with pytest.raises(ValueError, match=r"'nmae'.*name, address, plan"):
        await keeper.protect(ADA, "ada", ["nmae"])

    assert not keys_dir.exists()


@pytest.mark.parametrize("value", [{"$protected": "x"}, [{"$protected": 1, "key": "k"}]])
async def test_data_that_looks_protected_is_refused(keeper: Privacy, value: Any) -> None:
    """Otherwise a user could have somebody else's value revealed by sending it in."""
    with pytest.raises(ValueError, match="already"):
        await keeper.protect({"name": "Ada", "note": value}, "ada", ["name"])


@pytest.mark.parametrize("value", [nan, [{"deep": inf}], {1: "x"}, b"x", date(1815, 12, 10), {1}])
async def test_a_value_that_is_not_json_is_refused(keeper: Privacy, keys_dir: Path, value: Any) -> None:
    """Otherwise it would be revealed as another value: NaN as None, for example. No key is created."""
    with pytest.raises(TypeError, match="'name'"):
        await keeper.protect({**ADA, "name": value}, "ada", ["name"])

    assert not keys_dir.exists()


@pytest.mark.parametrize(("subject", "fields"), [("", ["name"]), (7, ["name"]), ("ada", "name")])
async def test_wrong_arguments_are_refused(keeper: Privacy, subject: Any, fields: Any) -> None:
    """The error comes before anything is stored."""
    with pytest.raises((ValueError, TypeError), match=r"subject|fields"):
        await keeper.protect(ADA, subject, fields)


async def test_only_the_owner_can_read_the_keys(keeper: Privacy, keys_dir: Path) -> None:
    """Tested with any umask, and after a key was replaced."""
    before = os.umask(0)
    try:
        await protected(keeper)
        await keeper.forget("customer-7")
        await protected(keeper)
    finally:
        os.umask(before)

    assert stat.S_IMODE(keys_dir.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys_dir.iterdir()} == {0o600}


async def test_a_damaged_key_file_is_an_error_and_is_kept(keeper: Privacy, keys_dir: Path) -> None:
    """A new key in its place would make older values unreadable."""
    data = await protected(keeper)
    key_file(keys_dir).write_text('{"key":')
    for call in (keeper.reveal(data), protected(keeper), keeper.forget("customer-7")):
        with pytest.raises(ProtectedDataError, match="restore the file"):
            await call

    assert key_file(keys_dir).read_text() == '{"key":'


async def test_a_key_that_cannot_be_stored_is_not_used(
    keeper: Privacy, keys_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is encrypted with it, and no part of it is left in the store."""

    def full(fd: int) -> None:
        raise OSError(28, "made to fail")

    with monkeypatch.context() as patched:
        patched.setattr(privacy, "_sync", full)
        with pytest.raises(OSError, match="made to fail"):
            await protected(keeper)

    assert [path.name for path in keys_dir.iterdir()] == ["lock"]
    assert await keeper.reveal(await protected(keeper)) == ADA


async def test_the_temporary_file_of_a_killed_process_does_no_harm(keeper: Privacy, keys_dir: Path) -> None:
    """The process was killed before it renamed its new file."""
    await protected(keeper)
    left = key_file(keys_dir).rename(key_file(keys_dir).with_suffix(".tmp"))

    assert await keeper.reveal(await protected(keeper)) == ADA
    assert not left.exists()


async def test_tasks_that_protect_values_of_a_new_subject_share_one_key(keys_dir: Path) -> None:
    """Each task has its own store, as processes have."""
    data = await asyncio.gather(*(protected(Privacy(DirectoryKeys(keys_dir))) for _ in range(20)))

    assert len({each["name"]["key"] for each in data}) == 1
    assert await Privacy(DirectoryKeys(keys_dir)).reveal(data) == [ADA] * 20


WORKER = """
import asyncio, sys
from eventfold.privacy import DirectoryKeys, Privacy

async def main():
    keeper = Privacy(DirectoryKeys(sys.argv[1]))
    for n in range(10**6):
        await keeper.protect({"n": n}, "s", ["n"])
        print(n, flush=True)
        await keeper.forget("s")

asyncio.run(main())
"""


async def test_a_process_killed_while_it_stores_keys_leaves_a_store_that_works(keeper: Privacy, keys_dir: Path) -> None:
    """There is no damaged file, no lock is left, and no file is readable for others."""
    for _ in range(3):
        worker = subprocess.Popen([sys.executable, "-c", WORKER, str(keys_dir)], stdout=subprocess.PIPE)
        try:
            assert worker.stdout is not None
            for _ in range(20):
                await asyncio.to_thread(worker.stdout.readline)
        finally:
            worker.send_signal(signal.SIGKILL)
            await asyncio.to_thread(worker.communicate)

        assert await keeper.reveal(await protected(keeper, "s")) == ADA


def test_without_the_package_cryptography_the_error_says_what_to_install() -> None:
    """The message names the extra."""
    script = "import sys; sys.modules['cryptography'] = None; import eventfold.privacy"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert "pip install 'eventfold[crypto]'" in done.stderr.splitlines()[-1]
