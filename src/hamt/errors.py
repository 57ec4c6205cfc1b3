"""The one exception that stands for a mistake of the user, and the way a command reports it."""


class UserError(Exception):
    """Something only the user can mend; its message is one line that says what to do."""
