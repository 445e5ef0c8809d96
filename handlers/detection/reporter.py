"""What a training says while it runs: progress often, measurements sparsely."""

import time
from collections.abc import Callable

from handlers.detection.job import Event, Measured, Progress

#: Seconds between two reports of progress, at least; the first and the last iteration are always reported.
_INTERVAL = 0.5
#: Measurements of the loss in a whole run, about.
_MEASUREMENTS = 200


class Reporter:
    """Emits Progress and Measured."""

    def __init__(
        self,
        emit: Callable[[Event], None],
        iterations: int,
        batch_size: int,
        measurements: list[tuple[int, dict[str, float]]],
    ) -> None:
        """`measurements`: those before a resumed run; goes on being filled, for the next snapshot."""
        self._emit = emit
        self._iterations = iterations
        self._batch_size = batch_size
        self._kept = measurements
        self._begin = time.monotonic()
        self._done = 0
        self._reported = -1.0
        #: Losses since the last measurement.
        self._losses: list[float] = []
        self._every = max(1, iterations // _MEASUREMENTS)

    @property
    def measurements(self) -> list[Measured]:
        """All so far, with those of the runs before."""
        return [Measured(iteration=iteration, values=values) for iteration, values in self._kept]

    def iteration(self, iteration: int, loss: float, rate: float) -> None:
        """An iteration is over."""
        self._done += 1
        self._losses.append(loss)
        last = iteration == self._iterations
        now = time.monotonic()
        if self._done == 1 or last or now - self._reported >= _INTERVAL:
            self._reported = now
            each = (now - self._begin) / self._done
            self._emit(
                Progress(
                    iteration=iteration,
                    max_num_iters=self._iterations,
                    loss=loss,
                    learning_rate=rate,
                    images_per_second=self._batch_size / max(each, 1e-9),
                    eta_seconds=each * (self._iterations - iteration),
                )
            )
        if iteration % self._every == 0 or last:
            self.measured(iteration, {"loss": sum(self._losses) / len(self._losses), "learning_rate": rate})
            self._losses.clear()

    def measured(self, iteration: int, values: dict[str, float]) -> None:
        """Something worth keeping."""
        self._kept.append((iteration, values))
        self._emit(Measured(iteration=iteration, values=values))
