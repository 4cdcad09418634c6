"""The class of the data of one event type, and the conversions between its objects and plain data.

Promise: data that `encode` returns can be read back into the class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import msgspec

from .._errors import InvalidEventError

Tags: TypeAlias = Callable[[Any], Iterable[str]]


class MismatchError(Exception):
    """Data does not fit its class. `field` is a path such as `lines[0].amount`; "" for all of the data."""

    def __init__(self, reason: str, field: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field


class Schema:
    """An event type's class, with the conversions between its objects and plain data."""

    def __init__(self, type: str, version: int, cls: Any, tags: Tags | None) -> None:
        self.type = type
        self.version = version
        self.cls = cls
        self.tags = tags
        self.name: str = cls.__qualname__
        self.is_model = _is_model(cls)

    def check(self) -> None:
        """Raises `TypeError` if msgspec can't decode into the class, or if an annotation contains an unknown name."""
        try:
            if not self.is_model:
                msgspec.json.Decoder(self.cls, dec_hook=decode_other)
        except (TypeError, NameError) as error:
            raise TypeError(
                f"event type {self.type!r}: {self.name} is not a class that can be decoded: {error}"
            ) from error

    def encode(self, obj: Any) -> Any:
        """Converts an object to plain data. Raises `InvalidEventError` if the data could not be read back."""
        try:
            data = msgspec.to_builtins(obj, str_keys=True, enc_hook=_encode_other)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidEventError(f"this {self.name} can't be written: {error}") from error
        self.check_data(data)
        return data

    def check_data(self, data: Any) -> None:
        """Raises `InvalidEventError` if the data could not be read back into the class."""
        try:
            self.decode(data)
        except MismatchError as error:
            raise InvalidEventError(
                f"data of event type {self.type!r} would not read back as {self.name}{_at(error.field)}: {error.reason}"
            ) from error

    def decode(self, data: Any) -> Any:
        """Converts plain data to an object; an object of the class is returned unchanged. Raises `MismatchError`."""
        if isinstance(data, self.cls):
            return data
        try:
            if self.is_model:
                return decode_other(self.cls, data)
            return msgspec.convert(data, self.cls, str_keys=True, dec_hook=decode_other)
        except msgspec.ValidationError as error:
            reason, field = _reason_and_field(str(error))
            raise MismatchError(reason, field) from error
        except Exception as error:
            raise _mismatch_of(error) from error


def _reason_and_field(message: str) -> tuple[str, str]:
    """Splits a message of msgspec, such as "Expected `int`, got `str` - at `$.lines[0].amount`"."""
    reason, _, path = message.partition(" - at `$")
    field = path.removesuffix("`").removeprefix(".")
    for missing in ("Object missing required field `", "Object contains unknown field `"):
        if reason.startswith(missing):
            name = reason.removeprefix(missing).removesuffix("`")
            field = f"{field}.{name}" if field else name
    return reason, field


def _mismatch_of(error: Exception) -> MismatchError:
    """A mismatch from an error that pydantic or the class itself raised."""
    if callable(errors := getattr(error, "errors", None)):
        first = errors(include_url=False, include_context=False, include_input=False)[0]
        return MismatchError(first["msg"], ".".join(map(str, first["loc"])))
    return MismatchError(repr(error))


def _at(field: str) -> str:
    return f", field {field!r}" if field else ""


def _is_model(cls: Any) -> bool:
    return hasattr(cls, "model_validate_json")


def is_supported(cls: type) -> bool:
    return (
        hasattr(cls, "__struct_fields__")
        or dataclasses.is_dataclass(cls)
        or hasattr(cls, "__attrs_attrs__")
        or _is_model(cls)
    )


def _encode_other(value: Any) -> Any:
    if _is_model(value.__class__):
        return value.model_dump(mode="json", by_alias=True)
    raise TypeError(f"{type(value).__name__} is not a JSON type")


def decode_other(cls: Any, value: Any) -> Any:
    if _is_model(cls):
        # From JSON, since a strict model accepts the JSON representation of a date or a tuple only there.
        return cls.model_validate_json(msgspec.json.encode(value))
    raise TypeError(f"{cls!r} can't be decoded from JSON")
