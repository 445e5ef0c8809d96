"""DL_TEST_RESULT: the detections of one image in one test."""

from collections.abc import Sequence

from pymongo import ReplaceOne

from handlers.store.database import Database, Document


class TestResults:
    """The detections of tests. Readers use those of the attempt that finished."""

    __test__ = False  # not a test class, whatever its name says to pytest

    def __init__(self, database: Database) -> None:
        self._db = database
        self._results = database.collection("DL_TEST_RESULT")

    async def put(self, rows: Sequence[Document]) -> None:
        """Store rows `{task_id, attempt, img_id, detections}`; a row written before is overwritten."""
        if rows:
            keys = ("task_id", "attempt", "img_id")
            await self._db.call(
                self._results.bulk_write,
                [ReplaceOne({key: row[key] for key in keys}, row, upsert=True) for row in rows],
                ordered=False,
            )
