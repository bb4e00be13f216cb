"""The one exception that users are meant to read."""


class UserError(Exception):
    """Something the user can put right; the message says in one sentence what is wrong and what to do.

    The doors (`train.py`, `eval.py`, `generate.py`) print it without a traceback and exit with `exit_code`.
    """

    exit_code = 2
