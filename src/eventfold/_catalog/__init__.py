"""Typed events: the catalog of their classes, and the decoders that turn lines into typed events."""

from .catalog import Catalog
from .decoding import OnMismatch, Typing, typing_of

__all__ = ["Catalog", "OnMismatch", "Typing", "typing_of"]
