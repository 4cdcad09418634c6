"""Typed events: the catalog of their classes, and the decoders of lines into their objects."""

from .catalog import Catalog
from .decoding import OnMismatch, Typing, typing_of

__all__ = ["Catalog", "OnMismatch", "Typing", "typing_of"]
