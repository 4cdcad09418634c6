"""`Catalog`: which class the data of an event type is an object of, and how data of older versions becomes such data.

Promises: what `to_event` gives can be read back into its class; an event that is read has data of the newest version,
or is a `SchemaError` that says where it stands and what does not fit; a type that is not in the catalog is left alone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import msgspec
from msgspec.structs import force_setattr

from ._codec.backwards import BackwardsDecoder
from ._codec.decode import Decoder, Slice
from ._codec.lines import Lines
from ._codec.stored import StoredEvent
from ._errors import InvalidEventError, SchemaError
from ._event import Event, PartialRecord, Record
from ._query import Query

logger = logging.getLogger("eventfold")

C = TypeVar("C", bound=type)
Tags: TypeAlias = Callable[[Any], Iterable[str]]
# From the data of one version to that of the next, or to several events (type, data), or none.
Upcaster: TypeAlias = Callable[[Any], Any]
F = TypeVar("F", bound=Upcaster)
OnMismatch: TypeAlias = Literal["raise", "skip"]


class Catalog:
    """The classes of a program's events: msgspec structs, dataclasses, attrs classes and pydantic models.

    Declare the classes and upcasters when the module is imported, and give the catalog to `EventLog.open`.
    """

    def __init__(self) -> None:
        self._by_type: dict[str, _Schema] = {}
        self._by_class: dict[type, _Schema] = {}
        self._upcasters: dict[str, dict[int, Upcaster]] = {}

    def __repr__(self) -> str:
        names = ", ".join(f"{schema.type} {schema.version}" for schema in self._by_type.values())
        return f"<Catalog: {names or 'empty'}>"

    def event(self, type: str, version: int = 1, tags: Tags | None = None) -> Callable[[C], C]:
        """Declares the class of an event type's data.

        Args:
            type: The event type.
            version: The version of the data that the class describes. It stands on the line, unless it is 1.
            tags: Gives an object's tags, which its event gets.

        Returns:
            A decorator, which returns the class as it is.

        Raises:
            ValueError: The type or the class is declared already, or the type or version is none.
            TypeError: The class is of no supported kind.
        """
        if not isinstance(type, str) or not type:
            raise ValueError(f"an event type must be a string that is not empty, not {type!r}")
        _check_version("version", version)

        def declare(cls: C) -> C:
            if not isinstance(cls, _type) or not _is_supported(cls):
                raise TypeError(
                    f"event type {type!r}: {cls!r} must be a msgspec struct, a dataclass, an attrs class or a pydantic "
                    "model (is @catalog.event above the class's other decorators?)"
                )
            if type in self._by_type:
                raise ValueError(
                    f"two classes are declared for event type {type!r}: {self._by_type[type].name} and "
                    f"{cls.__qualname__}; keep the newest, and write upcasters for the data of older versions"
                )
            if cls in self._by_class:
                raise ValueError(
                    f"{cls.__qualname__} is declared for two event types, {self._by_class[cls].type!r} and {type!r}"
                )
            for from_version in self._upcasters.get(type, ()):
                _check_older(type, from_version, version)
            self._by_type[type] = self._by_class[cls] = _Schema(type, version, cls, tags)
            return cls

        return declare

    def upcast(self, type: str, from_version: int) -> Callable[[F], F]:
        """Declares a function that takes data of one version of a type, and returns data of the next version.

        It may also return a list of `(type, data)`: the event becomes these events, or none. Their data is of the
        current version of its type; of the next version, where it is the same type.

        Args:
            type: The event type.
            from_version: The version of the data that the function takes.

        Returns:
            A decorator, which returns the function as it is.

        Raises:
            ValueError: There is no such older version, or it has an upcaster already.
        """
        _check_version("from_version", from_version)

        def declare(function: F) -> F:
            if not callable(function):
                raise TypeError(f"the upcaster of event type {type!r} must be a function, not {function!r}")
            if type in self._by_type:
                _check_older(type, from_version, self._by_type[type].version)
            upcasters = self._upcasters.setdefault(type, {})
            if from_version in upcasters:
                raise ValueError(f"two upcasters are declared for event type {type!r} from version {from_version}")
            upcasters[from_version] = function
            return function

        return declare

    def to_event(
        self,
        obj: object,
        *,
        ts: int | None = None,
        id: str | None = None,
        actor: str | None = None,
        meta: Any = None,
        tags: Iterable[str] = (),
    ) -> Event:
        """The event of an object, with its type, version and tags.

        Args:
            obj: An object of one of the catalog's classes.
            ts: Whole seconds since the Unix epoch; now if not given.
            id: The event's id.
            actor: Who caused it.
            meta: Any JSON value.
            tags: More tags than those that its class gives.

        Returns:
            An event whose data is plain, to be appended.

        Raises:
            InvalidEventError: The object's class is not in the catalog, or what it holds could not be read back.
        """
        schema = self._by_class.get(obj.__class__)
        if schema is None:
            raise InvalidEventError(
                f"{obj.__class__.__qualname__} is neither an Event nor in the catalog: declare it with "
                "@catalog.event(type)"
            )
        data = schema.encode(obj)
        own = () if schema.tags is None else schema.tags(obj)
        if isinstance(own, str) or isinstance(tags, str):
            raise InvalidEventError(f"{schema.name}: the tags must be a collection of strings, not one string")
        options: dict[str, Any] = {} if ts is None else {"ts": ts}
        event = Event(
            schema.type, data, id=id, actor=actor, meta=meta, tags=tuple(dict.fromkeys((*own, *tags))), **options
        )
        return event if schema.version == 1 else _of_version(event, data, schema.version)

    # For the log and its reader

    def check(self) -> None:
        """Raises `ValueError` for upcasters that lead nowhere, `TypeError` for a class that can't be decoded into."""
        for type, upcasters in self._upcasters.items():
            schema = self._by_type.get(type)
            if schema is None:
                raise ValueError(
                    f"event type {type!r} has upcasters, but no class: declare the class of its newest version with "
                    f"@catalog.event({type!r}, version=...)"
                )
            for version in range(min(upcasters), schema.version):
                if version not in upcasters:
                    raise ValueError(
                        f"event type {type!r} has no upcaster from version {version}, but one from version "
                        f"{min(upcasters)}, and {schema.name} is version {schema.version}"
                    )
        for schema in self._by_type.values():
            schema.check()

    def knows(self, obj: object) -> bool:
        """Whether the object is of one of the catalog's classes."""
        return obj.__class__ in self._by_class

    def encoded(self, event: object) -> Any:
        """What is written for something that is appended: an event with plain data and its version.

        Data of a type in the catalog must be that of its current version, unless the event was read with another one.
        """
        if not isinstance(event, Event):
            return self.to_event(event)
        schema = self._by_class.get(event.data.__class__)
        if schema is not None:
            if event.type != schema.type:
                raise InvalidEventError(
                    f"the data of an event of type {event.type!r} is a {schema.name}, whose type is {schema.type!r}"
                )
            return _of_version(event, schema.encode(event.data), schema.version)
        schema = self._by_type.get(event.type) if isinstance(event.type, str) else None
        if schema is None or isinstance(event, StoredEvent):
            return event
        schema.check_data(event.data)
        return event if schema.version == 1 else _of_version(event, event.data, schema.version)

    def sources(self, query: Query | None) -> Query | None:
        """What selects the lines that matching events may come from: an upcaster may give events of any type."""
        if query is None:
            return None
        for item in query.items:
            if item.types and self._upcasters:
                query |= Query(item.types.union(self._upcasters), item.tags)
        return query

    def is_current(self, event: StoredEvent) -> bool:
        """Whether an event's data needs no upcaster."""
        schema = self._by_type.get(event.type)
        return schema is None or schema.version == event.version

    def upcasted(self, type: str, data: Any, version: int) -> list[tuple[str, Any, int]]:
        """The events (type, object or plain data, version) that one on a line becomes. Raises `_MismatchError`."""
        schema = self._by_type.get(type)
        if schema is None:
            return [(type, data, version)]
        while version != schema.version:
            if version > schema.version:
                raise _MismatchError(
                    f"it is of version {version}, and the catalog knows {schema.name} of version {schema.version}"
                )
            upcaster = self._upcasters.get(type, {}).get(version)
            if upcaster is None:
                raise _MismatchError(f"it is of version {version}, and there is no upcaster from that")
            try:
                data = upcaster(data)
            except Exception as error:
                raise _MismatchError(f"the upcaster from version {version} failed: {error!r}") from error
            version += 1
            if isinstance(data, list):
                return [event for item in data for event in self._upcasted_item(type, item, version)]
        return [(type, schema.decode(data), version)]

    def _upcasted_item(self, source: str, item: Any, version: int) -> list[tuple[str, Any, int]]:
        if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[0], str):
            raise _MismatchError(
                f"the upcaster from version {version - 1} returned a list with {item!r}, which is not (type, data)"
            )
        type, data = item
        if type != source:
            # What comes of another type's upcasters does not go through its own: it is made today.
            schema = self._by_type.get(type)
            version = 1 if schema is None else schema.version
        return self.upcasted(type, data, version)


_type = type


class Typing(NamedTuple):
    """What a reader needs for typed events: the catalog, and what becomes of an event that does not fit."""

    catalog: Catalog
    on_mismatch: OnMismatch

    def decoder(self, query: Query | None, *, places: bool) -> Decoder:
        """A decoder whose events have objects as their data."""
        return _TypedDecoder(self, query, places=places)

    def backwards_decoder(self, query: Query | None) -> BackwardsDecoder:
        """The same, for the newest events first."""
        return _TypedBackwardsDecoder(self, query)

    def events_of(self, event: StoredEvent, wanted: Query | None) -> tuple[StoredEvent, ...]:
        """The events that one on a line becomes, as far as they are wanted. Raises `_MismatchError`."""
        if wanted is not None and not wanted.matches(event) and self.catalog.is_current(event):
            return ()
        converted = self.catalog.upcasted(event.type, event.data, event.version)
        return tuple(
            msgspec.structs.replace(event, type=type, data=data, version=version)
            for type, data, version in converted
            if wanted is None or wanted.matches_keys(type, event.tags)
        )

    def mismatch(self, mismatch: _MismatchError, event: Event, offset: int) -> None:
        """Raises `SchemaError`, or logs a warning where such events are skipped."""
        error = SchemaError(offset, event.type, mismatch.field, mismatch.reason)
        if self.on_mismatch == "raise":
            raise error from mismatch
        logger.warning("an event is passed over: %s", error)


class _MismatchError(Exception):
    """Data that does not fit; `field` as in `lines[0].amount`, "" for the whole of it."""

    def __init__(self, reason: str, field: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field


class _Schema:
    """A type's class, and how its objects become data and data its objects."""

    def __init__(self, type: str, version: int, cls: Any, tags: Tags | None) -> None:
        self.type = type
        self.version = version
        self.cls = cls
        self.tags = tags
        self.name: str = cls.__qualname__
        self.is_model = _is_model(cls)

    def check(self) -> None:
        """Raises `TypeError` if msgspec can't decode into the class, or its annotations name what does not exist."""
        try:
            if not self.is_model:
                msgspec.json.Decoder(self.cls, dec_hook=_decode_other)
        except (TypeError, NameError) as error:
            raise TypeError(
                f"event type {self.type!r}: {self.name} is no class that can be decoded: {error}"
            ) from error

    def encode(self, obj: Any) -> Any:
        """The object as plain data. Raises `InvalidEventError` if it could not be read back."""
        try:
            data = msgspec.to_builtins(obj, str_keys=True, enc_hook=_encode_other)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidEventError(f"this {self.name} can't be written: {error}") from error
        self.check_data(data)
        return data

    def check_data(self, data: Any) -> None:
        """Raises `InvalidEventError` if data could not be read back into the class."""
        try:
            self.decode(data)
        except _MismatchError as error:
            raise InvalidEventError(
                f"data of event type {self.type!r} would not read back as {self.name}{_at(error.field)}: {error.reason}"
            ) from error

    def decode(self, data: Any) -> Any:
        """The object that the data is. Raises `_MismatchError`."""
        try:
            if self.is_model:
                return _decode_other(self.cls, data)
            return msgspec.convert(data, self.cls, str_keys=True, dec_hook=_decode_other)
        except msgspec.ValidationError as error:
            reason, field = _reason_and_field(str(error))
            raise _MismatchError(reason, field) from error
        except Exception as error:
            raise _mismatch_of(error) from error


def _reason_and_field(message: str) -> tuple[str, str]:
    """The parts of msgspec's messages, such as "Expected `int`, got `str` - at `$.lines[0].amount`"."""
    reason, _, path = message.partition(" - at `$")
    field = path.removesuffix("`").removeprefix(".")
    for missing in ("Object missing required field `", "Object contains unknown field `"):
        if reason.startswith(missing):
            name = reason.removeprefix(missing).removesuffix("`")
            field = f"{field}.{name}" if field else name
    return reason, field


def _mismatch_of(error: Exception) -> _MismatchError:
    """What pydantic, or a class of its own accord, says."""
    if callable(errors := getattr(error, "errors", None)):
        first = errors(include_url=False, include_context=False, include_input=False)[0]
        return _MismatchError(first["msg"], ".".join(map(str, first["loc"])))
    return _MismatchError(repr(error))


def _at(field: str) -> str:
    return f", field {field!r}" if field else ""


def _is_model(cls: Any) -> bool:
    return hasattr(cls, "model_validate_json")


def _is_supported(cls: type) -> bool:
    return (
        hasattr(cls, "__struct_fields__")
        or dataclasses.is_dataclass(cls)
        or hasattr(cls, "__attrs_attrs__")
        or _is_model(cls)
    )


def _encode_other(value: Any) -> Any:
    if _is_model(value.__class__):
        return value.model_dump(mode="json", by_alias=True)
    raise TypeError(f"{type(value).__name__} is no JSON type")


def _decode_other(cls: Any, value: Any) -> Any:
    if _is_model(cls):
        # As JSON, so that strict models take what stands in JSON for a date, a tuple and so on.
        return cls.model_validate_json(msgspec.json.encode(value))
    raise TypeError(f"{cls!r} can't be decoded from JSON")


def _check_version(name: str, version: int) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"{name} must be an integer of 1 or more, not {version!r}")


def _check_older(type: str, from_version: int, version: int) -> None:
    if from_version >= version:
        raise ValueError(
            f"event type {type!r} has no version {from_version} to upcast from: its class is version {version}, and "
            "upcasters are for older ones"
        )


def _of_version(event: Event, data: Any, version: int) -> StoredEvent:
    """The event with this data, of which the line tells the version."""
    return StoredEvent(
        type=event.type,
        data=data,
        ts=event.ts,
        id=event.id,
        actor=event.actor,
        meta=event.meta,
        tags=event.tags,
        version=version,
    )


class _TypedSlice(Slice):
    """A slice some of whose lines give another number of events than one."""

    __slots__ = ("_events_of_lines",)

    def __init__(self, lines: Lines, events_of_lines: list[tuple[StoredEvent, ...]], query: Query | None) -> None:
        super().__init__(lines, [], [event for events in events_of_lines for event in events], query)
        self._events_of_lines = events_of_lines

    def records(self) -> Iterator[Record]:
        for line in Slice(self._lines, self._events_of_lines, []).records():
            events: Any = line.event  # all of them, not one
            yield from _records_of(line, events)


def _records_of(line: Record, events: tuple[StoredEvent, ...]) -> list[Record]:
    """The events of one line with its place."""
    kinds = [PartialRecord] * (len(events) - 1) + [Record]
    return [
        kind(event, line.start_offset, line.end_offset, line._line) for kind, event in zip(kinds, events, strict=False)
    ]


class _TypedDecoder(Decoder):
    """Gives events whose data is an object of the class of their type, if the catalog has one.

    Raises `SchemaError` at the first event that does not fit, after giving all before it, or passes it over.
    """

    def __init__(self, typing: Typing, query: Query | None, *, places: bool) -> None:
        sources = typing.catalog.sources(query)
        super().__init__(sources, places=places)
        self._typing = typing
        self._wanted = None if query is None or query.matches_all else query
        self._is_wider = sources != query

    def feed(self, lines: Lines) -> Iterator[Slice]:
        for piece in super().feed(lines):
            if not piece.events or (self._wants(piece.events) and self._convert_all(piece.events)):
                piece.query = self._wanted
                yield piece
            else:
                yield from self._convert_each(piece)

    def _wants(self, events: list[StoredEvent]) -> bool:
        wanted = self._wanted
        return wanted is None or not self._is_wider or all(map(wanted.matches, events))

    def _convert_all(self, events: list[StoredEvent]) -> bool:
        """Converts the data of all events, or of none, where one needs more than that."""
        schemas = self._typing.catalog._by_type
        typed: list[tuple[StoredEvent, Any]] = []
        try:
            for event in events:
                if (schema := schemas.get(event.type)) is not None:
                    if event.version != schema.version:
                        return False
                    typed.append((event, schema.decode(event.data)))
        except _MismatchError:
            return False
        for event, data in typed:
            # Nobody else has seen the event yet.
            force_setattr(event, "data", data)
        return True

    def _convert_each(self, piece: Slice) -> Iterator[Slice]:
        """The patient way, for events of older versions, and such as don't fit."""
        found: list[Any] = piece._found
        lines = piece._lines
        events_of_lines: list[tuple[StoredEvent, ...]] = []
        for event in found:
            events: tuple[StoredEvent, ...] = ()
            if isinstance(event, StoredEvent):
                try:
                    events = self._typing.events_of(event, self._wanted)
                except _MismatchError as mismatch:
                    before = len(lines.data) - len(lines.data.split(b"\n", len(events_of_lines))[-1])
                    try:
                        self._typing.mismatch(mismatch, event, lines.offset_at(before))
                    except SchemaError:
                        if before:
                            yield _TypedSlice(lines.part(0, before), events_of_lines, self._wanted)
                        raise
            events_of_lines.append(events)
        yield _TypedSlice(lines, events_of_lines, self._wanted)


class _TypedBackwardsDecoder(BackwardsDecoder):
    """Does what `_TypedDecoder` does, the newest first."""

    def __init__(self, typing: Typing, query: Query | None) -> None:
        super().__init__(typing.catalog.sources(query))
        self._typing = typing
        self._wanted = None if query is None or query.matches_all else query

    def feed(self, lines: Lines) -> Iterator[Record]:
        for record in super().feed(lines):
            event: Any = record.event
            try:
                events = self._typing.events_of(event, self._wanted)
            except _MismatchError as mismatch:
                self._typing.mismatch(mismatch, event, record.start_offset)
            else:
                yield from reversed(_records_of(record, events))
