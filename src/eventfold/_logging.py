"""The records that the library passes to Python's `logging`.

Promise: each record of the logger `eventfold` has a stable name, `event_name`, and its details as attributes, so that
filters, alerts and JSON formatters need not parse messages. docs/operations.md lists the names.
"""

from __future__ import annotations

import logging

DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR

logger = logging.getLogger("eventfold")


def log_event(level: int, name: str, message: str, *, cause: BaseException | None = None, **fields: object) -> None:
    """Logs a record.

    Args:
        level: One of the levels above.
        name: The stable name, which must be in the table in docs/operations.md.
        message: The message, in which `%(field)s` stands for a field.
        cause: An exception whose traceback is logged too.
        fields: The details. Numbers stay numbers; all other values are converted to strings.
    """
    if logger.isEnabledFor(level):
        details = {key: value if isinstance(value, int | float) else str(value) for key, value in fields.items()}
        # Not named `event`, which is the name of the message in some formatters.
        logger.log(level, message, details, exc_info=cause, extra={"event_name": name, **details}, stacklevel=2)
