"""The two ways in which a command ends other than well."""


class InputError(ValueError):
    """Unusable input: one line that says what was got, what is allowed and what to do. Exit status 2."""


class CheckFailed(Exception):
    """A check that a command makes did not hold; `result` is what it measured. Exit status 1."""

    def __init__(self, message: str, result: dict):
        super().__init__(message)
        self.result = result
