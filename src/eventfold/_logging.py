"""What the library writes to the program's log.

Promise: each record of the logger `eventfold` has a stable name, `event_name`, and its details as attributes, so that a
filter, an alert or a JSON formatter need not parse messages. docs/operations.md lists the names.
"""

from __future__ import annotations

import logging

DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR

logger = logging.getLogger("eventfold")


def log_event(level: int, name: str, message: str, *, cause: BaseException | None = None, **fields: object) -> None:
    """Logs a record.

    Args:
        level: One of the levels above.
        name: The stable name, a row of the table in docs/operations.md.
        message: The text for people, which refers to fields as `%(field)s`.
        cause: An exception whose traceback is to be logged too.
        fields: The details. Numbers stay numbers; anything else becomes text.
    """
    if logger.isEnabledFor(level):
        details = {key: value if isinstance(value, int | float) else str(value) for key, value in fields.items()}
        # Not `event`: that is what some formatters call the message.
        logger.log(level, message, details, exc_info=cause, extra={"event_name": name, **details}, stacklevel=2)
