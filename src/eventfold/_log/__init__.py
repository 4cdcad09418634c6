"""`EventLog`, which most programs use; its methods are divided into modules by purpose."""

from .log import EventLog, EventLogBuilder
from .views import Views

__all__ = ["EventLog", "EventLogBuilder", "Views"]
