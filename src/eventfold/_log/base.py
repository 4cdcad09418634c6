"""The base class of `EventLog`, with the attributes that its methods use."""

from __future__ import annotations

from .._catalog import Catalog
from .._engine import HasPaths, Paths, paths_of
from .._errors import EventfoldError
from .._reader import EventReader
from .._writer import EventWriter
from .own_snapshots import OwnSnapshotsReader
from .views import Views


class LogBase(HasPaths):
    """An open log: a reader, a writer unless the log is read-only, views and a catalog."""

    _reader: EventReader
    _writer_or_none: EventWriter | None
    _views: Views
    _catalog: Catalog | None = None

    @property
    def _location(self) -> str:
        return str(self._reader._source.location)

    @property
    def _saves_snapshots(self) -> bool:
        """Whether this log writes the views' snapshots."""
        return self._writer_or_none is not None or isinstance(self._reader, OwnSnapshotsReader)

    @property
    def _views_location(self) -> str:
        """Identifies the log for its views, together with the directory of their snapshots."""
        reader = self._reader
        own = f", with snapshots in {reader.directory}" if isinstance(reader, OwnSnapshotsReader) else ""
        return f"{self._location}{own}"

    @property
    def _writer(self) -> EventWriter:
        if self._writer_or_none is None:
            raise EventfoldError(
                f"the log in {self._location} was opened read-only: open it without read_only=True to write"
            )
        return self._writer_or_none

    @property
    def _paths(self) -> Paths:
        return paths_of(self._reader._source)
