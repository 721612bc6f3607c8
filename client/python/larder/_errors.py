"""What can go wrong, as exceptions."""


class Error(RuntimeError):
    """A call did not do what it was asked. `status` is its number in larder_c.h."""

    status = 0


class InvalidArgument(Error, ValueError):
    """The caller's mistake."""


class Mismatch(Error):
    """Spaces differ; the message names the field."""


class Exhausted(Error):
    """Something is full: back off and try again."""


class DeadlineExceeded(Error, TimeoutError):
    """The deadline passed."""


class Cancelled(Error):
    """The operation was taken back."""


class Unavailable(Error, ConnectionError):
    """The daemon is gone; later calls reconnect."""


class Aborted(Error):
    """A hold was revoked, or the epoch advanced."""


class Denied(Error, PermissionError):
    """Another tenant's, or a wrong token."""


_KINDS = {
    -1: InvalidArgument,
    -3: Mismatch,
    -5: Exhausted,
    -6: DeadlineExceeded,
    -7: Cancelled,
    -8: Unavailable,
    -9: Aborted,
    -10: Denied,
}


def make(status: int, message: str) -> Error:
    """The exception for a negative status of the C interface."""
    error = _KINDS.get(status, Error)(message or f"status {status}")
    error.status = status
    return error
