"""Typed events: the catalog of their classes, and what decodes lines into objects of these."""

from .catalog import Catalog
from .decoding import OnMismatch, Typing, typing_of

__all__ = ["Catalog", "OnMismatch", "Typing", "typing_of"]
