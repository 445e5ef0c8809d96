"""What keeps the password of MongoDB from the processes that the service starts."""

import ctypes
import os
import re

from handlers.store.database import secrets_of

#: Names that say that the value is a credential: PGPASSWORD, AWS_SECRET_ACCESS_KEY, GH_TOKEN, SSH_AUTH_SOCK, …
_NAMED_SECRET = re.compile(
    r"(?i)(password|passwd|passphrase|(^|_)(secrets?|tokens?|credentials?|auth|(api|access|private)?keys?))(_|$)"
)
#: A URL with a password in it.
_URL_WITH_PASSWORD = re.compile(r"://[^/@\s]*:[^@\s]*@")

#: A shorter password may be a part of anything: `root`, say, of every path below /root.
_TELLING_LENGTH = 8

_PR_SET_DUMPABLE = 4


def child_environment(uri: str) -> dict[str, str]:
    """Our environment without anything that gives access to something; `uri` is MongoDB's.

    Left out are our settings; what the name calls a credential; URLs with a password; and whatever holds a secret of
    `uri`, under any name. A list of what may pass would be stricter, but the variables that CUDA, NCCL, OpenMP and
    Python listen to have no end.
    """
    secrets = secrets_of(uri)

    def withheld(name: str, value: str) -> bool:
        return bool(
            name.startswith("DLTASK_")
            or _NAMED_SECRET.search(name)
            or _URL_WITH_PASSWORD.search(value)
            or any(value == secret or (secret in value and len(secret) >= _TELLING_LENGTH) for secret in secrets)
        )

    return {name: value for name, value in os.environ.items() if not withheld(name, value)}


def hide_from_children() -> None:
    """Have the kernel keep the memory and the environment of this process from others of the same user (prctl(2)).

    The child runs as the same user, and /proc/PID/environ of the worker has what was left out of its own. It also ends
    core dumps, which would hold the password, and needs root for a debugger. A child is free of it once it is executed.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
