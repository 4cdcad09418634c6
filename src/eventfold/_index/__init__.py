"""The index: finds the offsets of the events with a tag or an id.

It stores pairs of a key and an offset, in a derived file beside the log or in the log's engine. Pairs that are not in
the file yet are in memory.
"""

from .engine_index import EngineIndex
from .file_index import FileIndex, index_path
from .index import Index
from .reading import read_back, read_from

__all__ = ["EngineIndex", "FileIndex", "Index", "index_path", "read_back", "read_from"]
