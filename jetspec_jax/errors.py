"""The one exception that a user is meant to read."""


class JetSpecError(ValueError):
    """Something the user gave is wrong: the message names the offender and the remedy.

    The command-line tools print it as one line and exit with status 2; a traceback means a defect of ours.
    """
