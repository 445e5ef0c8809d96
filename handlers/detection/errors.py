"""Why an attempt in the child ends early; `attempt` turns each into its event. Anything else raised is a bug."""

import errno

#: What the system says when a machine is full, damaged or overloaded: the same attempt may do well on another.
_MACHINE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
    errno.ENODEV,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
}


class DataError(Exception):
    """The message, the images or the model cannot be used; trying again would end the same way."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        #: The parameter or field of the task document to mend, where there is one.
        self.field = field


class LossError(Exception):
    """The loss is not finite; the message names the iteration and the images."""


class DeviceError(RuntimeError):
    """The device of this machine cannot be used, or no longer; another worker's may do."""


class OutOfMemory(Exception):
    """The device has too little memory for a batch."""


class SnapshotError(Exception):
    """The snapshot to resume from cannot be read, or belongs to another training."""


class StoppedEarly(Exception):
    """SIGTERM was heard and everything worth keeping is on disk."""

    def __init__(self, iteration: int) -> None:
        super().__init__(f"stopped at iteration {iteration}")
        self.iteration = iteration


def machine_fault(error: BaseException | None) -> OSError | None:
    """The system error behind `error` that is the machine's fault, or None.

    Behind it, because a library that was interrupted by one may raise its own error over it, as `torch.save` does.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None
