"""The one exception that is meant for a person rather than for a programmer."""


class UserError(ValueError):
    """Bad input that its user can mend: a file, a config field, a tensor.

    The message is one line that names the thing and says what to do next. `main` prints it without
    a traceback and exits with code 2.
    """
