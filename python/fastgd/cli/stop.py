"""The one exception that a command ends with in words instead of a traceback."""


class Stop(Exception):
    """The command cannot go on; its message is all that the user needs."""
