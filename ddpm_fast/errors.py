"""The exception that means "your input was wrong", as opposed to "the package has a bug".

Commands print its message and exit with status 2. Every other exception keeps its traceback.
"""


class InputError(ValueError):
    """Wrong input. The message says what was wrong, what was expected, and what to do."""
