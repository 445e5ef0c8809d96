"""What a service needs of its machine and its database, looked at one by one, by `dltask doctor` and at the start."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One thing looked at. `fix` says what to do, and is empty where there is nothing to do.

    `failed` is what keeps the service from its work; `warning` what somebody should know before they wonder.
    """

    name: str
    state: State
    found: str
    fix: str = ""

    @property
    def ok(self) -> bool:
        """Whether a service can run with it."""
        return self.state != "failed"


def halves(message: str) -> tuple[str, str]:
    """(what was found, the fix) of a one-line error, which has them with a semicolon between."""
    found, _, fix = message.partition("; ")
    return found, fix
