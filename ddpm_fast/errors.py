"""The one exception that means "your input was wrong", as opposed to "we have a bug".

Commands print its message and exit with status 2; every other exception keeps its traceback.
"""


class InputError(ValueError):
    """Bad input. The message says what was wrong, what was expected, and what to do."""
