"""`EventLog`, what most programs use; its methods stand in modules by what they are for."""

from .log import EventLog, EventLogBuilder
from .views import Views

__all__ = ["EventLog", "EventLogBuilder", "Views"]
