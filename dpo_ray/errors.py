"""Errors a user can meet: one root, few subclasses.

Each takes one message, so that it survives pickling between Ray processes. A message says what happened, where (stage,
row id, path), what was got and expected, and what to do.
"""


class DpoRayError(Exception):
    """Root of every error raised on purpose."""


class ConfigError(DpoRayError, ValueError):
    """The configuration, or a file that it names, cannot be used."""


class SchemaError(DpoRayError, ValueError):
    """A table does not have the columns, types or keys of its contract."""


class StageError(DpoRayError):
    """A stage could not finish: too many rows dropped, rows lost, no rows left."""


class StaleArtifactError(DpoRayError):
    """A committed stage does not match the configuration it is asked for."""


class ResourceError(DpoRayError):
    """The cluster does not have, or does not give back, what a stage needs."""


class NonFiniteLossError(DpoRayError):
    """A loss or gradient is not a number; training stopped before it could spread."""


def raised_last(traceback: str) -> DpoRayError | str:
    """What a traceback ends in: one of these errors, as it was raised; of any other the last line.

    Ray hands over as text alone what the constructor of an actor raised.
    """
    line = traceback.strip().splitlines()[-1].strip().rstrip(".")
    name, _, message = line.partition(": ")
    module, _, kind = name.rpartition(".")
    own = globals().get(kind) if module == __name__ else None
    return own(message) if isinstance(own, type) else line
