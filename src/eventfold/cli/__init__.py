"""The command line `eventfold`, which needs the extra `cli`.

Promises: results go to standard output, and everything else to standard error; in a pipe, events are their exact lines;
an error is one line that says what to do; Ctrl-C and a closed pipe end a command without a traceback.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Runs the command in `sys.argv`, and exits with its exit status."""
    try:
        from ._app import app
    except ImportError as error:
        print(
            "eventfold: the command line needs packages that are not installed: pip install 'eventfold[cli]' "
            f"({error})",
            file=sys.stderr,
        )
        sys.exit(1)
    app(prog_name="eventfold")
