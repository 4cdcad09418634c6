"""Documents in a key-value bucket: each is replaced as a whole, and stored once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from nats.aio.client import Client
from tests.jetstream.servers import Servers

from eventfold.jetstream import JetStream
from eventfold.jetstream._committer import StreamCommitter


async def test_a_document_is_replaced_completely(committer: StreamCommitter) -> None:
    documents = committer.source.documents
    for data in (b"first", b"x" * 2_000_000, b"last"):
        await documents.store("view", "a.b", data)
        assert await documents.load("view", "a.b") == data


async def test_a_deleted_document_can_be_created_again(committer: StreamCommitter) -> None:
    documents = committer.source.documents
    await documents.store("consumer", "mailer", b"1")
    await documents.delete("consumer", "mailer")
    assert await documents.load("consumer", "mailer") is None
    await documents.store("consumer", "mailer", b"2")

    assert await documents.load("consumer", "mailer") == b"2"
    assert (await documents.names("consumer"), await documents.names("view")) == (["mailer"], [])


@pytest.mark.parametrize("data", [b"small", b"x" * 2_000_000], ids=["small", "large"])
async def test_a_document_whose_acknowledgement_is_lost_is_stored(
    committer: StreamCommitter, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    """The document was written, and the second attempt finds an unexpected revision, which is its own."""
    documents = committer.source.documents
    await documents.store("view", "v", b"before")
    original, lost = Client.request, []

    async def lose_first(self: Client, subject: str, *arguments: Any, **options: Any) -> Any:
        answer = await original(self, subject, *arguments, **options)
        if subject.endswith(".view.v") and not lost:
            lost.append(answer)
            raise TimeoutError
        return answer

    monkeypatch.setattr(Client, "request", lose_first)
    await documents.store("view", "v", data)

    assert lost
    assert await documents.load("view", "v") == data


async def test_two_concurrent_replacements_leave_one_complete_document(committer: StreamCommitter) -> None:
    """The document is complete, and the parts of the other one are gone."""
    documents = committer.source.documents
    contents = [bytes([n]) * 1_000_000 for n in range(4)]

    await asyncio.gather(*(documents.store("view", "v", content) for content in contents))

    assert await documents.load("view", "v") in contents


async def test_a_document_that_was_replaced_leaves_nothing_behind(committer: StreamCommitter, client: Any) -> None:
    documents = committer.source.documents
    for n in range(3):
        await documents.store("view", "v", bytes([n]) * 2_000_000)
    await documents.store("view", "v", b"small")

    bucket = f"KV_eventfold-{committer.source.connection.settings.stream}"
    assert (await client.stream_info(bucket)).state.messages == 1


async def test_documents_may_be_larger_than_a_message(
    own_servers: Callable[[], Servers],
) -> None:
    servers = own_servers()
    servers.all[0].configure(max_payload="128KB")
    servers.all[0].restart()
    committer = await JetStream(servers.addresses, "log").open_committer()
    data = bytes(range(256)) * 4000

    await committer.source.documents.store("view", "v", data)

    assert await committer.source.documents.load("view", "v") == data
    await committer.aclose()
