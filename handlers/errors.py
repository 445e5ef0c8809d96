"""How a handler says that a task cannot go on. Anything else that it raises is a bug."""

from schemas.enums import TaskErrorCode


class PermanentError(Exception):
    """Trying again would end the same way: the task ends FAILED with this kind, message and code."""

    def __init__(
        self, kind: str, message: str, *, field: str | None = None, code: TaskErrorCode = TaskErrorCode.OK
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.field = field
        self.code = code


class TemporaryError(Exception):
    """The surroundings failed, not the task: it goes back to PENDING, for at least `delay` seconds if given."""

    def __init__(self, kind: str, message: str, *, delay: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.delay = delay


class LostTask(Exception):
    """The task is somebody else's by now, or over: this attempt may change nothing and stops."""


class StartupError(Exception):
    """The process cannot start; the message is one line that says what to mend."""
