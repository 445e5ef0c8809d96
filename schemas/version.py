"""The version of the documents' form: what a worker may touch of what another version of the service has written.

The rule (docs/upgrading.md): a version reads and writes what the version before it does, and adds to it. Where that
cannot be, the number is raised, and a worker leaves alone whatever has a higher number than its own.
"""

from typing import Any

#: 1: release 0.1.0, whose documents carry no number. 2: the number; `traceparent` and `tracestate` of clients;
#: `name:version` in trainings, which 0.1.0 refuses, and the weights of models.
SCHEMA_VERSION = 2


def is_newer(value: Any) -> bool:
    """Whether a document with this `schema_version` was written by a version that this one need not understand."""
    # Anything that is no number, or missing, is of a version before there were any, or of somebody's hand.
    return isinstance(value, int | float) and not isinstance(value, bool) and value > SCHEMA_VERSION
