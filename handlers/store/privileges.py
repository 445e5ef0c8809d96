"""What the service does in MongoDB, by collection: the least that its user must be allowed.

`docs/roles.json` is the same as a role that an administrator can create; tests hold the two together, and run the
service under that role.
"""

from collections.abc import Iterable, Mapping
from typing import Any

_INDEXED = frozenset({"createIndex", "listIndexes"})
#: A bucket that tasks leave files in, and the janitor clears, which notes in them first that nothing names them.
#: Drivers create its indexes with its first file.
_BUCKET = _INDEXED | {"insert", "remove", "update"}

#: Actions by collection; "" is the database, and so every collection in it. The images, their labels and their files
#: belong to the platform: they are read, and no more.
WORKER: Mapping[str, frozenset[str]] = {
    # The change stream is on the database, and MongoDB asks for both there.
    "": frozenset({"changeStream", "find"}),
    "DL_TASK": _INDEXED | {"update"},
    "DL_MODEL": _INDEXED | {"insert", "update"},
    "DL_TEST_RESULT": _INDEXED | {"insert", "update"},
    "DL_TASK_METRIC": frozenset({"insert", "update"}),
    "DL_TASK_LOG": frozenset({"insert", "update"}),
    "DL_WORKER": _INDEXED | {"insert", "update", "remove"},
    "IMG_INFO": frozenset({"listIndexes"}),
    "IMG_LAB_INFO": frozenset({"listIndexes"}),
    **{f"{bucket}.{part}": _BUCKET for bucket in ("messages", "models", "reports") for part in ("files", "chunks")},
}


def lacking(granted: Iterable[Mapping[str, Any]], database: str) -> list[str]:
    """What of WORKER these privileges do not cover, as `update on DL_TASK`.

    `granted` is what the command connectionStatus lists: `{resource, actions}`, all roles resolved.
    """
    allowed: dict[str, set[str]] = {}
    for privilege in granted:
        resource = privilege["resource"]
        if resource.get("anyResource"):
            resource = {"db": "", "collection": ""}
        if resource.get("db") in (database, ""):
            allowed.setdefault(resource["collection"], set()).update(privilege["actions"])
    everywhere = allowed.get("", set())
    if "anyAction" in everywhere:
        return []
    return [
        f"{action} on {name or 'the database'}"
        for name, actions in WORKER.items()
        for action in sorted(actions - everywhere - (allowed.get(name, set()) if name else set()))
    ]
