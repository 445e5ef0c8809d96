"""Measured images that were trained on are counted and named, as a plain search of all pairs finds them."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.detection import leaks as module
from handlers.detection.fingerprints import Fingerprints, collected
from handlers.detection.leaks import MAX_DISTANCE, leaks
from schemas.result import MAX_EXAMPLES


def many(seed: int, count: int, prefix: str, like: np.ndarray | None = None, bits: int = 12) -> Fingerprints:
    """Random ones, or (`like`) each one of those with up to `bits` bits changed."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, 256, (count, 16)).astype(np.uint8)
    if like is not None and len(like):
        rows = like[random.integers(0, len(like), count)].copy()
        for row in rows:
            for bit in random.choice(128, random.integers(0, bits + 1), replace=False):
                row[bit // 8] ^= 1 << (bit % 8)
    return Fingerprints(tuple(f"{prefix}{number}" for number in range(count)), rows)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), measured=st.integers(0, 40), training=st.integers(0, 40), block=st.integers(1, 99)
)
def test_as_a_plain_search(seed: int, measured: int, training: int, block: int) -> None:
    """However the work is cut into blocks."""
    known = many(seed, training, "t")
    some = many(seed + 1, measured, "m", known.bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        found = leaks(some, known, in_training=False)
    pairs = [
        [sum((a ^ b).bit_count() for a, b in zip(one.tolist(), other.tolist(), strict=True)) for other in known.bits]
        for one in some.bits
    ]
    nearest = [min(row) for row in pairs if row]
    assert found.count == sum(bits <= MAX_DISTANCE for bits in nearest)
    assert (found.compared, found.training_images) == (measured if training else 0, training)
    for example in found.examples:
        one, other = int(example.img_id[1:]), int(example.other_img_id[1:])
        assert example.distance == pairs[one][other] == min(pairs[one]) <= MAX_DISTANCE
    distances = [example.distance for example in found.examples]
    assert distances == sorted(nearest)[: len(distances)]
    assert len(distances) == min(found.count, MAX_EXAMPLES)


def test_equal_training_images_are_counted() -> None:
    """Each beyond the first; not asked for, it is not told."""
    known = collected([("a", bytes(16)), ("b", bytes(16)), ("c", b"x" * 16), ("d", bytes(16))])
    assert leaks(collected([]), known, in_training=True).duplicates_in_training == 2
    found = leaks(collected([("e", bytes(16))]), known, in_training=False)
    assert (found.count, found.duplicates_in_training) == (1, None)
    assert "duplicates_in_training" not in found.model_dump()


def test_the_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many pairs only some of the measured images are compared, evenly spread, and the result says how many."""
    known = many(0, 1000, "t")
    some = many(1, 2000, "m", known.bits, bits=0)
    monkeypatch.setattr(module, "MAX_PAIRS", 100_000)
    found = leaks(some, known, in_training=False)
    assert (found.compared, found.count) == (100, 100)
    assert {int(example.img_id[1:]) % 20 for example in found.examples} == {0}


def test_many_images_take_seconds() -> None:
    """20,000 against 20,000: a machine that is busy with other things has ten times as long as it needs."""
    one, other = many(0, 20_000, "t"), many(1, 20_000, "m")
    begin = time.monotonic()
    assert leaks(one, other, in_training=True).count == 0
    assert time.monotonic() - begin < 30
