"""Typed events: the catalog of their classes, and the decoders that turn lines into typed events."""

from .catalog import Catalog
from .decoding import OnMismatch, TypedDecoding, typed_decoding

__all__ = ["Catalog", "OnMismatch", "TypedDecoding", "typed_decoding"]
