"""The errors gemlax raises for what a user gave it.

Error
|- CheckpointError    a file that is damaged, incomplete or of another shape (a ValueError)
|- UnsupportedError   a checkpoint or option that gemlax does not implement
'- RequestError       a prompt or a setting that cannot be served (a ValueError)
"""

__all__ = ["CheckpointError", "Error", "RequestError", "UnsupportedError"]


class Error(Exception):
    """Base of every error of gemlax's own."""


class CheckpointError(Error, ValueError):
    """A checkpoint is damaged, incomplete, or its tensors do not fit its config."""


class UnsupportedError(Error, NotImplementedError):
    """A checkpoint or an option that gemlax does not implement."""


class RequestError(Error, ValueError):
    """A prompt or a setting that cannot be served."""
