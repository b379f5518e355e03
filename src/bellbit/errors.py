"""The one exception a user is meant to see."""


class BellbitError(Exception):
    """Something the user can mend: the message names the thing, the cause and the way out.

    The command line prints it without a traceback and exits with code 2.
    """
