"""Where in a log the events with a tag or an id are.

The pairs are kept in a derived file beside the log and, for what is not in the file yet, in memory; or the log's engine
keeps them.
"""

from .answers import Answers
from .in_engine import EngineIndex
from .index import Index, index_path
from .reading import read_back, read_from

__all__ = ["Answers", "EngineIndex", "Index", "index_path", "read_back", "read_from"]
