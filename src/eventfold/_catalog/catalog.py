"""`Catalog`: the class of the data of each event type, and the functions that convert data of older versions.

Promises: an event that `to_event` returns can be read back into its class; an event that is read has data of the newest
version, or reading raises a `SchemaError` that says where the event is and what does not fit; events of a type that is
not in the catalog are not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from .._codec.stored import StoredEvent
from .._errors import InvalidEventError
from .._event import Event
from .._query import Query
from .schema import MismatchError, Schema, Tags, is_supported

C = TypeVar("C", bound=type)
# Takes data of one version, and returns data of the next version or a list of events (type, data).
Upcaster: TypeAlias = Callable[[Any], Any]
F = TypeVar("F", bound=Upcaster)

_type = type


class Catalog:
    """The classes of a program's events: msgspec structs, dataclasses, attrs classes and pydantic models.

    Declare the classes and upcasters at the top level of a module, and pass the catalog to `EventLog.open`.
    """

    def __init__(self) -> None:
        self._by_type: dict[str, Schema] = {}
        self._by_class: dict[type, Schema] = {}
        self._upcasters: dict[str, dict[int, Upcaster]] = {}

    def __repr__(self) -> str:
        names = ", ".join(f"{schema.type} {schema.version}" for schema in self._by_type.values())
        return f"<Catalog: {names or 'empty'}>"

    def event(self, type: str, version: int = 1, tags: Tags | None = None) -> Callable[[C], C]:
        """Declares the class of the data of an event type.

        Args:
            type: The event type.
            version: The version of the data that the class describes. Versions above 1 are stored in the event.
            tags: A function that takes an object of the class and returns the tags of its event.

        Returns:
            A decorator, which returns the class unchanged.

        Raises:
            ValueError: The type or the class is declared already, or the type or the version is invalid.
            TypeError: The class is not of a supported kind.
        """
        if not isinstance(type, str) or not type:
            raise ValueError(f"an event type must be a non-empty string, not {type!r}")
        _check_version("version", version)

        def declare(cls: C) -> C:
            if not isinstance(cls, _type) or not is_supported(cls):
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
            self._by_type[type] = self._by_class[cls] = Schema(type, version, cls, tags)
            return cls

        return declare

    def upcast(self, type: str, from_version: int) -> Callable[[F], F]:
        """Declares a function that takes data of one version of a type, and returns data of the next version.

        The function may also return a list of pairs `(type, data)`, which may be empty. The event then becomes these
        events. If a pair has the same type, its data is of the next version; otherwise, its data is of the current
        version of the other type.

        Args:
            type: The event type.
            from_version: The version of the data that the function takes.

        Returns:
            A decorator, which returns the function unchanged.

        Raises:
            ValueError: There is no such older version, or it has an upcaster already.
            TypeError: The decorated object is not callable.
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
        """Returns the event of an object, with the type, the version and the tags that are declared for its class.

        Args:
            obj: An object of one of the catalog's classes.
            ts: The time, in whole seconds since the Unix epoch; the current time if not given.
            id: The event's id.
            actor: Who or what caused the event.
            meta: Any JSON value.
            tags: Tags in addition to those of the class.

        Returns:
            An event with plain data, which can be appended.

        Raises:
            InvalidEventError: The object's class is not in the catalog, or its data could not be read back.
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

    # What a log and its reader use

    def _check(self) -> None:
        """Raises `ValueError` if an upcaster is missing or useless, `TypeError` if a class can't be decoded into."""
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

    @property
    def _schemas(self) -> Mapping[str, Schema]:
        """The classes by event type."""
        return self._by_type

    def _knows(self, obj: object) -> bool:
        """Whether the object is of one of the catalog's classes."""
        return obj.__class__ in self._by_class

    def _encoded(self, event: object) -> Any:
        """The event to write for an appended event or object, with plain data and the version.

        If the type is in the catalog, the data must be of the current version, unless the event was read from a log.
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

    def _widened(self, query: Query | None) -> Query | None:
        """A query for all lines that may become events that match `query`: an upcaster may return any type."""
        if query is None:
            return None
        for item in query.items:
            if item.types and self._upcasters:
                query |= Query(item.types.union(self._upcasters), item.tags)
        return query

    def _is_current(self, event: StoredEvent) -> bool:
        """Whether an event needs no upcaster."""
        schema = self._by_type.get(event.type)
        return schema is None or schema.version == event.version

    def _upcasted(self, type: str, data: Any, version: int) -> list[tuple[str, Any, int]]:
        """The events (type, object or plain data, version) into which an event on a line is converted.

        Raises `MismatchError`.
        """
        schema = self._by_type.get(type)
        if schema is None:
            return [(type, data, version)]
        while version != schema.version:
            if version > schema.version:
                raise MismatchError(
                    f"it has version {version}, but the catalog has {schema.name} of version {schema.version}"
                )
            upcaster = self._upcasters.get(type, {}).get(version)
            if upcaster is None:
                raise MismatchError(f"it has version {version}, but there is no upcaster from that version")
            try:
                data = upcaster(data)
            except Exception as error:
                raise MismatchError(f"the upcaster from version {version} failed: {error!r}") from error
            version += 1
            if isinstance(data, list):
                return [event for item in data for event in self._upcasted_item(type, item, version)]
        return [(type, schema.decode(data), version)]

    def _upcasted_item(self, source: str, item: Any, version: int) -> list[tuple[str, Any, int]]:
        if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[0], str):
            raise MismatchError(
                f"the upcaster from version {version - 1} returned a list with {item!r}, which is not (type, data)"
            )
        type, data = item
        if type != source:
            # What an upcaster returns for a different type has the current version of that type: no upcaster is needed.
            schema = self._by_type.get(type)
            version = 1 if schema is None else schema.version
        return self._upcasted(type, data, version)


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
    """The event with this data and version."""
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
