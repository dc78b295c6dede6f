"""Our four kinds of error, each one line for the user; any other exception shows its traceback."""

class ConfigError(ValueError):
    """A flag or folder that cannot be used."""

class DataError(ValueError):
    """Malformed input: what, where (file:line), what to do."""

class UnusablePair(DataError):
    """A well-formed pair that cannot be trained on: it is dropped and counted, by this reason."""

class ModelError(ValueError):
    """A configuration, a weights file or a request that the model cannot serve."""

class RunError(RuntimeError):
    """The run cannot go on."""
