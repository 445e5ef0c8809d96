"""Whether the database answers, asked all the time by somebody whom no fault of the workers touches."""

import threading
import time
from typing import Any

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from tests.chaos.faults import Interval

#: An answer that takes longer is none: workers give an operation twenty seconds.
_SLOW_SECONDS = 2.0
_PAUSE_SECONDS = 0.5


class Pulse:
    """Writes a document again and again, as durably as the service does, and notes when that was not answered.

    A machine can do to the servers what no fault here does: a disk that is busy with other things for half a minute
    keeps every write waiting. Whoever is judged by time has to know.
    """

    def __init__(self, uri: str) -> None:
        self.silences: list[Interval] = []
        self._uri = uri
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        with MongoClient[dict[str, Any]](
            self._uri, appname="pulse", timeoutMS=60_000, w="majority", journal=True
        ) as client:
            while not self._stop.wait(_PAUSE_SECONDS):
                begin = time.time()
                try:
                    client.chaos.pulse.replace_one({"_id": 0}, {"at": begin}, upsert=True)
                except PyMongoError:
                    pass
                if time.time() - begin > _SLOW_SECONDS:
                    self.silences.append(Interval("database", "no answer", begin, time.time()))
