"""The two ways in which a run ends badly."""


class ConfigError(ValueError):
    """A flag or folder that cannot be served: the message names it and says what to do."""


class RunError(RuntimeError):
    """The run cannot go on; what was saved before is intact."""
