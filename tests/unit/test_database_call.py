"""What comes out of the one call that every operation goes through."""

import bson
import pytest
from pymongo.errors import AutoReconnect

from handlers.store.database import away
from tests.mock_database import MockDatabase


async def test_an_operation_tried_a_thousand_times_is_an_outage() -> None:
    """PyMongo's back-off is a power of two that no float holds any more."""

    async def tired() -> float:
        return min(0.1 * 2**1100, 1.0)

    with pytest.raises(AutoReconnect) as raised:
        await MockDatabase().call(tired)
    assert away(raised.value)


async def test_a_number_that_bson_cannot_hold_is_none() -> None:
    async def encode() -> bytes:
        return bson.encode({"number": 2**64})

    with pytest.raises(OverflowError, match="8-byte"):
        await MockDatabase().call(encode)
