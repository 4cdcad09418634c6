"""Large states in chunks: bytes and objects are the same as from one call, and no chunk takes long."""

from __future__ import annotations

import dataclasses
import gc
import json
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.generated import examples
from tests.support import event

from eventfold import Event, EventLog, View, _chunks, line_hash, snapshot
from eventfold._chunks import decode_in_chunks, encode_in_chunks
from eventfold._round_trip import difference


class Account(msgspec.Struct):
    """An element that contains containers."""

    owner: str
    tags: list[str] = []


class Struct(msgspec.Struct, rename="camel", frozen=True):
    """A struct with two large fields and small ones around them."""

    kind: str
    by_number: dict[int, Account] = {}
    in_between: dict[str, Any] = {}
    all_names: list[str] = []
    last: int = 0


@dataclasses.dataclass
class Dataclass:
    """A dataclass whose last field is large."""

    kind: str
    pairs: list[tuple[int, str]]


@dataclasses.dataclass
class WantsAll:
    """A class that uses all its fields as soon as it is created."""

    names: list[str]
    count: int = 0

    def __post_init__(self) -> None:
        self.count = len(self.names)


# Texts that look like the end of an element.
TRICKY = 'a","b":{"c":[1,"d\\"},{"e'
ACCOUNTS = {n: Account(f"{TRICKY}{n}", [TRICKY, "x"] * (n % 3)) for n in range(300)}
NAMES = [f"{TRICKY}{n}" for n in range(300)]
STATES: dict[str, tuple[Any, Any]] = {
    "a dict": ({name: {"by_number": {TRICKY: [None, True, 1.5]}} for name in NAMES}, dict),
    "a dict of numbers": ({name: n for n, name in enumerate(NAMES)}, dict[str, int]),
    "a dict of structs": (ACCOUNTS, dict[int, Account]),
    "a list of texts": (NAMES, list[str]),
    "a list of lists": ([[n, [TRICKY]] for n in range(300)], list),
    "a list of numbers": (list(range(3000)), list[int]),
    "anything": ({name: [{"a": name}] for name in NAMES}, Any),
    "a counter": (Counter({name: n for n, name in enumerate(NAMES)}), Counter),
    "a struct": (Struct(TRICKY, ACCOUNTS, {"last": 1}, NAMES, 7), Struct),
    "a struct with keys like its own in it": (
        Struct(TRICKY, ACCOUNTS, {"byNumber": {}, "allNames": [1]}, NAMES),
        Struct,
    ),
    "a struct with one large field": (Struct("x", all_names=NAMES), Struct),
    "a dataclass": (Dataclass(TRICKY, [(n, TRICKY) for n in range(300)]), Dataclass),
    "a dataclass that wants all fields": (WantsAll(NAMES), WantsAll),
    "a large text": ("x" * 20_000, str),
    "a large element": ({"a": "x" * 20_000, **dict.fromkeys("bcdefghijklmnopqrstuvw", 1)}, dict),
}
# Texts that are not split.
WHOLE = (
    "a large text",
    "a large element",
    "a dataclass that wants all fields",
    "a struct with keys like its own in it",
)


def encode(value: Any) -> bytes:
    return msgspec.json.encode(value)


def decode(data: bytes | memoryview, type_: Any) -> Any:
    return snapshot._decode(data, type_)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes states of some kilobytes count as large."""
    monkeypatch.setattr(_chunks, "CHUNK_SIZE", 512)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", STATES)
def test_a_state_in_chunks_is_what_one_call_gives(name: str) -> None:
    """The bytes are the same, so that older versions and the Rust crate can read them, and so is the decoded state."""
    state, type_ = STATES[name]
    data = b"".join(encode_in_chunks(state, encode, int))
    read = snapshot.decode_state(data, type_)

    assert data == encode(state)
    assert read == state
    assert difference(state, read) is None


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", [name for name in STATES if name not in WHOLE])
def test_a_large_state_is_never_decoded_or_encoded_by_one_long_call(name: str) -> None:
    """Containers at the top, and in fields of structs and dataclasses, are split."""
    state, type_ = STATES[name]
    sizes: list[int] = []

    def watched_encode(value: Any) -> bytes:
        data = encode(value)
        sizes.append(len(data))
        return data

    def watched_decode(data: bytes | memoryview, type_: Any) -> Any:
        sizes.append(len(data))
        return decode(data, type_)

    data = b"".join(encode_in_chunks(state, watched_encode, int))
    decode_in_chunks(data, Any if type_ is Counter else type_, watched_decode, int)

    assert max(sizes) <= 5 * _chunks.CHUNK_SIZE < len(data)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("harm", [b"", b"}", b"x", b'"', b","])
def test_bytes_that_are_no_state_are_refused_as_by_one_call(harm: bytes) -> None:
    """This holds wherever the damage is, and also if the type does not fit."""
    data = encode(STATES["a struct"][0])
    for at in range(0, len(data), 997):
        damaged = data[:at] + harm + data[at + 1 :]
        try:
            expected = decode(damaged, Struct)
        except Exception as error:
            with pytest.raises(type(error)):
                decode_in_chunks(damaged, Struct, decode, int)
        else:
            assert decode_in_chunks(damaged, Struct, decode, int) == expected
    with pytest.raises(msgspec.ValidationError):
        decode_in_chunks(encode(NAMES), list[int], decode, int)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("state", ['a,"' * 2_000, {"a": 'a,"' * 2_000}, ['a,"' * 2_000]])
def test_a_text_is_not_split_at_its_commas(state: Any) -> None:
    """Without a type, only the data shows that the state is a text, whose parts are texts too."""
    assert decode_in_chunks(encode(state), Any, decode, int) == state


@pytest.mark.usefixtures("small_chunks")
def test_a_comma_without_an_element_is_refused_as_by_one_call() -> None:
    """What is before it would be a valid chunk: the empty list."""
    text = b'"%b"' % (b"x" * 600)
    with pytest.raises(msgspec.DecodeError):
        decode_in_chunks(b"[," + b",".join([text] * 4) + b"]", Any, decode, int)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text('a",:{}[]\\', max_size=12),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text('a",:{}[]\\', max_size=6), inner, max_size=6),
    max_leaves=60,
)


@examples(100)
@given(state=JSON)
def test_whatever_json_is_taken_apart_is_put_together_again(state: Any) -> None:
    """The chunks are so small that a split is tried at every comma."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_chunks, "CHUNK_SIZE", 8)
        patch.setattr(_chunks, "MAX_WHOLE", 1)
        data = b"".join(encode_in_chunks(state, encode, int))
        read = decode_in_chunks(data, Any, decode, int)

    assert data == encode(state)
    assert json.dumps(read) == json.dumps(state)


@pytest.mark.parametrize("keys", ["", ', "query": {"a": 1, "offset": 2}', ', "other": [{"b": 1,"offset":3}]'])
async def test_a_file_that_is_written_in_another_form_is_read_all_the_same(tmp_path: Path, keys: str) -> None:
    """The file has spaces, and an `offset` in an unexpected place."""
    state = '{"a": [1,{"b":2,"offset":3}]}'
    tail = f', "hash": "h", "position": 5, "position_hash": "p", "checksum": "{line_hash(state.encode())}"'
    path = tmp_path / "v.snapshot.json"
    path.write_text(f'{{"state": {state},"offset":5{tail}{keys}}}')
    read = await snapshot.load(path)
    path.write_text(f'{{"state":{state},"offset":5{tail}{keys}}}')
    again = await snapshot.load(path)

    assert read is not None
    assert read.state == {"a": [1, {"b": 2, "offset": 3}]}
    assert read.position == 5
    assert again == read


async def test_others_run_while_a_large_snapshot_is_saved_and_loaded(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread encodes, compares and decodes it and pauses in between; the loaded state equals the saved one."""
    large = {f"key {n}": [n, "x" * 100] for n in range(5_000)}
    pausing: list[int] = []

    def pause(_: _chunks.Pause) -> None:
        pausing.append(threading.get_ident())

    def grow(state: dict[str, Any], _: Event) -> dict[str, Any]:
        return state | large

    monkeypatch.setattr(_chunks.Pause, "__call__", pause)
    async with EventLog.open(data_dir, views=[View("v", grow, dict)]) as log:
        await log.append(event(0))
        await log.refresh_all()
    saved = len(pausing)
    view = View("v", grow, dict)
    async with EventLog.open(data_dir, views=[view]):
        pass

    assert view.state == large
    assert 0 < saved < len(pausing)
    assert threading.get_ident() not in pausing


class Watchable(msgspec.Struct, weakref=True):
    """A state that a weak reference can watch."""

    count: int = 0


async def test_a_state_is_freed_with_its_closed_log_at_once(data_dir: Path) -> None:
    """Otherwise the garbage collector would free it later, all at once, in the middle of other tasks' work."""

    def count(state: Watchable, event: Event) -> Watchable:
        state.count += 1
        return state

    gc.disable()
    try:
        async with EventLog.open(data_dir, views=[View("count", count, Watchable)]) as log:
            await log.append(event(1))
            await log.refresh_all()
            state = weakref.ref(log.view("count"))
            assert state() is not None
        del log

        assert state() is None
    finally:
        gc.enable()


def test_no_large_file_is_put_together_in_one_go() -> None:
    """Other code runs between the chunks: joining 10 MB holds the interpreter for milliseconds."""
    state = {str(number): "x" * 1000 for number in range(1_000)}
    written: list[int] = []

    class Buffer(snapshot.BytesIO):
        def write(self, data: Any) -> int:
            written.append(len(data))
            return super().write(data)

    pauses: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "BytesIO", Buffer)
        data, encoded = snapshot.encode_whole(
            snapshot.Snapshot(None, 5, "", 5, ""), state, lambda: pauses.append(len(written))
        )

    assert msgspec.json.decode(data)["state"] == msgspec.json.decode(encoded) == state
    assert max(written) <= 2 * _chunks.CHUNK_SIZE
    # No two chunks may follow each other without a pause.
    assert all(number in pauses for number, size in enumerate(written, 1) if size > _chunks.CHUNK_SIZE // 2)
