"""Whole numbers as clients in any language send them, and as MongoDB can store and find them."""

from decimal import Decimal
from typing import Annotated, Any

from bson import Decimal128, Int64
from pydantic import Field

UINT16_MAX = 2**16 - 1
UINT32_MAX = 2**32 - 1
UINT64_MAX = 2**64 - 1
INT64_MAX = 2**63 - 1

#: A number of things, as MongoDB can hold it.
Count = Annotated[int, Field(ge=0, le=INT64_MAX)]

#: Above this a double no longer names one whole number.
DOUBLE_EXACT_MAX = 2**53


def whole_number(value: Any) -> int:
    """`value` as an int: an int32, int64, whole double up to 2^53, or whole Decimal128. Never a bool or a text.

    Raises ValueError.
    """
    if isinstance(value, bool):
        raise ValueError("expected a whole number, not a boolean")
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        # NaN fails the comparison too.
        if not abs(value) <= DOUBLE_EXACT_MAX:
            raise ValueError("expected a whole number; a double above 2^53 no longer names one")
        if value.is_integer():
            return int(value)
    if isinstance(value, Decimal128):
        decimal: Decimal = value.to_decimal()
        # The exponent is bounded first: 1E+6000 is whole, and a needlessly large int.
        if decimal.is_finite() and decimal.adjusted() < 25 and decimal == decimal.to_integral_value():
            return int(decimal)
    raise ValueError("expected a whole number")


def bson_uint64(number: int) -> Int64 | Decimal128:
    """`number` (0 … 2^64-1) as stored: Int64 up to 2^63-1, Decimal128 above; MongoDB matches and orders by value."""
    return Int64(number) if number <= INT64_MAX else Decimal128(str(number))
