"""Why an attempt in the child ends early; `__main__` turns each into its event. Anything else raised is a bug."""


class DataError(Exception):
    """The message, the images or the model cannot be used; trying again would end the same way."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        #: The parameter or field of the task document to mend, where there is one.
        self.field = field


class LossError(Exception):
    """The loss is not finite; the message names the iteration and the images."""


class OutOfMemory(Exception):
    """The device has too little memory for a batch."""


class SnapshotError(Exception):
    """The snapshot to resume from cannot be read, or belongs to another training."""


class StoppedEarly(Exception):
    """SIGTERM was heard and everything worth keeping is on disk."""

    def __init__(self, iteration: int) -> None:
        super().__init__(f"stopped at iteration {iteration}")
        self.iteration = iteration
