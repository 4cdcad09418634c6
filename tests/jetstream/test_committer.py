"""Commits to a stream: one message for all that wait, judged by the true head, and stored once despite repeats."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from tests.jetstream.appends import append, line, pending, read
from tests.jetstream.servers import Servers

from eventfold import ConditionalAppendError, Head, UnknownOutcomeError
from eventfold.jetstream import JetStream
from eventfold.jetstream._committer import StreamCommitter


async def test_appends_that_wait_together_become_one_message(committer: StreamCommitter) -> None:
    first, second = await append(committer, 1, 2, 3), await append(committer, 4)

    assert (first.head.offset, second.head.offset) == (1 << 24, 2 << 24)
    assert await read(committer.source) == b"".join(map(line, (1, 2, 3, 4)))


async def test_an_append_that_expects_an_outdated_head_is_refused(engine: JetStream) -> None:
    one, other = await engine.open_committer(), await engine.open_committer()
    seen = (await append(one, 1)).head
    await append(other, 2)

    late = await one.commit([pending(3, seen)])

    assert isinstance(late.outcomes[0], ConditionalAppendError)
    assert await read(one.source) == line(1) + line(2)
    await one.aclose()
    await other.aclose()


async def test_counters_of_two_processes_lose_no_update(server: Servers) -> None:
    """Each process reads the head and appends on condition that it has not changed, again and again."""
    engines = [JetStream(server.addresses, "counter", attempt_timeout=2.0 + i / 10) for i in range(2)]
    committers = [await engine.open_committer() for engine in engines]

    async def count(committer: StreamCommitter) -> None:
        done = 0
        while done < 20:
            head = await committer.source.head()
            outcome = (await committer.commit([pending(done, head)])).outcomes[0]
            done += not isinstance(outcome, Exception)

    await asyncio.gather(*map(count, committers))

    assert (await read(committers[0].source)).count(b"\n") == 40
    for committer in committers:
        await committer.aclose()


async def test_a_condition_after_a_refused_append_of_the_same_group_holds(committer: StreamCommitter) -> None:
    head = (await append(committer, 1)).head

    commit = await committer.commit([pending(2, Head(5, "no")), pending(3, head), pending(4, head)])

    assert [isinstance(outcome, Exception) for outcome in commit.outcomes] == [True, False, True]
    assert await read(committer.source) == line(1) + line(3)


@pytest.mark.parametrize("conditional", [False, True])
async def test_a_commit_whose_acknowledgement_is_lost_is_written_once(
    committer: StreamCommitter, monkeypatch: pytest.MonkeyPatch, conditional: bool
) -> None:
    """The commit is sent again, and the server or the committer recognises it."""
    head = (await append(committer, 1)).head
    original, lost = Client.request, []

    async def lose_first(self: Client, subject: str, *arguments: Any, **options: Any) -> Any:
        answer = await original(self, subject, *arguments, **options)
        if subject.startswith("eventfold.") and not lost:
            lost.append(answer)
            raise TimeoutError
        return answer

    monkeypatch.setattr(Client, "request", lose_first)
    commit = await committer.commit([pending(2, head if conditional else None)])

    assert lost
    assert commit.outcomes == [0]
    assert commit.head.offset == 2 << 24
    assert await read(committer.source) == line(1) + line(2)


@pytest.mark.parametrize(
    "answer",
    [
        b'{"stream":"s","seq":0}',
        b'{"error":{"code":409,"err_code":10158,"description":"duplicate message id is in process"}}',
        b'{"error":{"code":503,"err_code":10008,"description":"JetStream system temporarily unavailable"}}',
        b"no JSON",
    ],
    ids=["sequence 0", "in process", "unavailable", "no JSON"],
)
async def test_a_response_without_an_acknowledgement_is_ignored(
    committer: StreamCommitter, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    """The append is sent again, and is in the log once."""
    original, answers = Client.request, [answer]

    async def replace_first(self: Client, subject: str, *arguments: Any, **options: Any) -> Any:
        message = await original(self, subject, *arguments, **options)
        if subject.startswith("eventfold.") and answers:
            message.data = answers.pop()
        return message

    monkeypatch.setattr(Client, "request", replace_first)
    commit = await append(committer, 1)

    assert (commit.outcomes, commit.head.offset) == ([0], 1 << 24)
    assert await read(committer.source) == line(1)


@pytest.mark.parametrize("code", [(503, 10023), (500, 10047)], ids=["resources", "storage"])
async def test_a_full_disk_is_an_error_at_once_and_nothing_was_written(
    committer: StreamCommitter, monkeypatch: pytest.MonkeyPatch, code: tuple[int, int]
) -> None:
    """The server refuses the message before it looks at it, and repeats would be refused too."""
    original, refused = Client.request, []

    async def refuse(self: Client, subject: str, *arguments: Any, **options: Any) -> Any:
        if not subject.startswith("eventfold."):
            return await original(self, subject, *arguments, **options)
        refused.append(subject)
        error = {"code": code[0], "err_code": code[1], "description": "insufficient resources"}
        return Msg(_client=self, data=msgspec.json.encode({"error": error}))

    monkeypatch.setattr(Client, "request", refuse)
    with pytest.raises(OSError, match="insufficient resources") as raised:
        await append(committer, 1)

    assert raised.value.errno == errno.ENOSPC
    assert len(refused) == 1


async def test_a_conflicting_message_that_cannot_be_read_yet_is_waited_for(
    committer: StreamCommitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message may be the append's own first attempt, which a new leader knows before it can be read."""
    head = (await append(committer, 1)).head
    original, faults = Client.request, ["in the way", "lost"]

    async def disturb(self: Client, subject: str, *arguments: Any, **options: Any) -> Any:
        if not subject.startswith("eventfold.") or not faults:
            return await original(self, subject, *arguments, **options)
        if faults.pop() == "lost":
            raise TimeoutError
        error = {"code": 400, "err_code": 10071, "description": "wrong last sequence: 2"}
        return Msg(_client=self, data=msgspec.json.encode({"error": error}))

    monkeypatch.setattr(Client, "request", disturb)
    commit = await committer.commit([pending(2, head)])

    assert (commit.outcomes, faults) == ([0], [])
    assert await read(committer.source) == line(1) + line(2)


async def test_an_append_without_an_answer_has_an_unknown_outcome(own_servers: Any) -> None:
    servers = own_servers()
    committer = await JetStream(servers.addresses, "log", timeout=1, attempt_timeout=0.3).open_committer()
    await append(committer, 1)
    servers.kill()

    with pytest.raises(UnknownOutcomeError, match="may or may not be in the log"):
        await append(committer, 2)

    await committer.aclose()


async def test_a_writer_continues_when_its_server_is_back(own_servers: Any) -> None:
    servers = own_servers()
    committer = await JetStream(servers.addresses, "log", attempt_timeout=0.3).open_committer()
    await append(committer, 1)
    servers.kill()
    waiting = asyncio.create_task(append(committer, 2))
    await asyncio.sleep(0.5)
    servers.start()

    await waiting

    assert await read(committer.source) == line(1) + line(2)
    await committer.aclose()


async def test_a_commit_that_is_too_large_for_a_message_is_refused(committer: StreamCommitter) -> None:
    with pytest.raises(OSError, match="bytes"):
        await committer.commit([pending(1, size=9 * 2**20)])

    await append(committer, 2)
    assert await read(committer.source) == line(2)
