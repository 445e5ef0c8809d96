"""How often the worker looks for garbage in cycles."""

import gc

#: New objects that may hold others, and rounds of the younger generations, between two looks. With Python's own 700 the
#: records of a batch, tens of thousands and none of them in a cycle, were looked at over and over: a request message
#: took a fifth longer, a third beside other work.
_THRESHOLDS = (10_000, 10, 10)


def collect_rarely() -> None:
    """Have this process look for garbage in cycles less often. All else goes at once, as ever."""
    gc.set_threshold(*_THRESHOLDS)
