"""The store's database over mongomock, for what needs no server."""

from typing import Any

from mongomock_motor import AsyncMongoMockClient

from handlers.store.database import Database


class MockDatabase(Database):
    """Empty. mongomock takes no codecs and no write concern, hence no `super().__init__`; nor has it buckets."""

    def __init__(self) -> None:
        self.db = AsyncMongoMockClient(tz_aware=True)["mock"]
        self._failed = lambda error: None

    def bucket(self, name: str) -> Any:
        """None: the collections of a bucket are there, and no more."""
        return None
