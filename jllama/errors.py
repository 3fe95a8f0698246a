"""The one exception that means: the input is wrong, not the program."""


class InputError(ValueError):
    """What was found, what was expected and what to do. A command prints it and exits with 2."""
