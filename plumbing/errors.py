"""Our four kinds of error, each one line for the user. All other exceptions show their traceback."""


class ConfigError(ValueError):
    """A flag or folder that cannot be used: the message names it and says what to do."""


class DataError(ValueError):
    """Malformed input: the message says what, where (file:line) and what to do."""


class UnusablePair(DataError):
    """A well-formed pair that cannot be trained on: it is dropped and counted, by this reason."""


class ModelError(ValueError):
    """A configuration, a weights file or a request that the model cannot serve."""


class RunError(RuntimeError):
    """The run cannot go on."""
