"""The one exception a user is meant to see, and what others say in a line."""

from __future__ import annotations

import errno


class BellbitError(Exception):
    """Something the user can mend: the message names the thing, the cause and the way out.

    The command line prints it without a traceback and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def disk_reason(error: Exception) -> str:
    """Why something could not be written; safetensors hides the number of the error in a text."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    return "no space left" if full else first_line(error)
