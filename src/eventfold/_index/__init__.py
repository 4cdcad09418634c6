"""Where in a log the events with a tag or an id stand: a derived file beside the log and what is not in it yet, or
what the log's engine keeps."""

from .answers import Answers
from .in_engine import EngineIndex
from .index import Index, index_path
from .reading import read_back, read_from

__all__ = ["Answers", "EngineIndex", "Index", "index_path", "read_back", "read_from"]
