"""What this worker counts and measures for Prometheus: one named method for each fact, on a registry of its own.

`docs/metrics.md` says what each metric means. A label's value is a word of this code, never one of a document: a task
id or the name of a model would make a series of its own for each. What is looked up instead of told is in `gauges`.
"""

import math
import platform
import time
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder

from handlers.store.database import StoreError
from handlers.store.kinds import kind_of
from handlers.store.queue import QueueState, ServerTime
from schemas.enums import TaskErrorCode
from service.gauges import DeviceGauges, GpuGauges, QueueGauges
from service.gpus import GpuUse

#: How an attempt can be over for its worker. `released`: given back unblamed, since the worker stops. `retried`: back
#: in the queue after a fault. `lost`: the task is somebody else's. `abandoned`: left to its lease.
Outcome = Literal["succeeded", "failed", "cancelled", "released", "retried", "lost", "abandoned"]

#: How a child process can end. `finished`: exit code 0. `failed`: another exit code. `signal`: by one
#: that this worker did not send. `killed`: by this worker. `unused`: it waited for a job when the worker stopped.
#: `died_waiting`: it waited for a job, and died.
ChildEnd = Literal["finished", "failed", "signal", "killed", "unused", "died_waiting"]

#: The kinds of error that fail a task, or send it back to the queue: each has its series from the start, since the
#: first of a series is no increase to Prometheus. What is not here counts as `other`.
ERRORS = (
    *("bug", "child_died", "data", "database", "disk_full", "document", "hung", "loss", "lost_worker", "machine"),
    *("memory", "model", "other", "output", "snapshot", "stopped"),
)

#: Outcomes that are an end state of the task.
_END = {"succeeded": "SUCCEEDED", "failed": "FAILED", "cancelled": "CANCELLED"}

_ADMISSION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_START_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400)
_ATTEMPT_BUCKETS = (1, 5, 15, 60, 300, 900, 3600, 10800, 43200, 86400, 259200)
_SWEEP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Every metric of one worker. It is told of facts, and keeps no thread, no connection and no global state."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"dltask_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"dltask_{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"dltask_{name}_seconds", text, labels, buckets=buckets, registry=registry)

        ProcessCollector(registry=registry)
        Info("dltask_build", "The version of this worker", registry=registry).info(
            {"version": version("dltask"), "python": platform.python_version(), "pymongo": version("pymongo")}
        )
        self._queue = QueueGauges(registry)
        self._devices = DeviceGauges(registry)
        self._gpus = GpuGauges(registry)

        self._admissions = counter("admissions", "Documents that this worker answered, by error code", "code")
        for code in TaskErrorCode:
            self._admissions.labels(code.name)
        self._admission = histogram(
            "admission",
            "From a document's insert to this worker's acknowledged answer, by the server's clock",
            _ADMISSION_BUCKETS,
        )
        self._start = histogram(
            "start", "From a task's admission to its first claim, by the server's clock", _START_BUCKETS, "type"
        )
        self._attempt = histogram(
            "attempt", "From an attempt's claim to its outcome", _ATTEMPT_BUCKETS, "type", "outcome"
        )
        self._ended = counter("tasks_ended", "Tasks that this worker ended", "type", "state", "error")
        self._retried = counter("tasks_retried", "Attempts that went back to the queue after a fault", "type", "error")
        self._images = Gauge(
            "dltask_images_per_second", "Images a second of the running tasks", ("type",), registry=registry
        )
        #: By type and attempt.
        self._rates: dict[str, dict[str, float]] = {"TRAIN": {}, "TEST": {}}
        for task_type in self._rates:
            self._images.labels(task_type)
            self._ended.labels(task_type, "SUCCEEDED", "")
            self._ended.labels(task_type, "CANCELLED", "")
            for error in ERRORS:
                self._ended.labels(task_type, "FAILED", error)
                self._retried.labels(task_type, error)

        self._renewals = counter("lease_renewals", "Renewals of leases, done and failed", "result")
        for result in ("done", "failed"):
            self._renewals.labels(result)
        self._losses = counter("leases_lost", "Attempts whose task turned out to be somebody else's, or gone")
        self._taken_back = counter("tasks_taken_back", "Tasks that this worker took from a lost one", "status")
        for status in ("PENDING", "FAILED"):
            self._taken_back.labels(status)

        self._stream_open = gauge("stream_open", "Whether the change stream is open")
        self._stream_opens = counter("stream_opens", "Openings of the change stream, the first one included")
        self._stream_ends = counter("stream_ends", "Ends of the change stream", "reason")
        self._events = counter("stream_events", "Change events of interest", "kind")
        self._lag = gauge(
            "stream_lag_seconds", "How far the change stream is behind the newest write, in whole seconds"
        )
        self._lag.set(math.nan)

        self._sweep = histogram("sweep", "One sweep that was answered throughout", _SWEEP_BUCKETS)
        self._sweep_failures = counter("sweep_failures", "Sweeps, or steps of one, that failed", "step")
        self._sweep_age = gauge("sweep_success_age_seconds", "Since the end of the last sweep without any failure")
        self._swept_at = time.monotonic()
        self._sweep_age.set_function(lambda: time.monotonic() - self._swept_at)

        self._child_starts = counter("child_starts", "Child processes that were started")
        self._child_ends = counter("child_ends", "Child processes that ended", "reason")

        self._database_errors = counter("mongodb_errors", "Operations of MongoDB that raised, by kind", "kind")
        self._database_up = gauge("database_up", "Whether the last look at the queue was answered")
        self._read_age = gauge("database_read_age_seconds", "Since the last look at the queue that was answered")
        self._read_at = time.monotonic()
        self._read_age.set_function(lambda: time.monotonic() - self._read_at)

        self._clock: ServerTime | None = None
        #: The second that the change stream has reached; None while there is none.
        self._reached: int | None = None

    def text(self) -> tuple[bytes, str]:
        """Everything, in the text format of Prometheus, and its media type."""
        encode, media_type = choose_encoder("")
        return encode(self._registry), media_type

    # ---- what befalls tasks

    def admitted(self, code: TaskErrorCode, inserted: datetime | None) -> None:
        """A document was answered; `inserted` is when it was written, if a change event told."""
        self._admissions.labels(code.name).inc()
        self._observe_since(self._admission, inserted)

    def claimed(self, task_type: str, attempt: int, admitted: datetime) -> None:
        """A task was claimed that was admitted then. Its first attempt is what a client waits for."""
        if attempt == 1:
            self._observe_since(self._start.labels(task_type), admitted)

    def progressed(self, task_type: str, attempt: str, images_per_second: float) -> None:
        """An attempt, named so that no other has its name, told its rate."""
        self._rates[task_type][attempt] = images_per_second
        self._images.labels(task_type).set(sum(self._rates[task_type].values()))

    def attempt_over(self, task_type: str, attempt: str, outcome: Outcome, error: str, seconds: float) -> None:
        """An attempt came to its outcome; `error` is the kind of what went wrong, where something did."""
        error = error if error in ERRORS else "other" if outcome in ("failed", "retried") else ""
        self._attempt.labels(task_type, outcome).observe(seconds)
        self._rates[task_type].pop(attempt, None)
        self._images.labels(task_type).set(sum(self._rates[task_type].values()))
        if outcome in _END:
            self._ended.labels(task_type, _END[outcome], error).inc()
        elif outcome == "retried":
            self._retried.labels(task_type, error).inc()
        elif outcome == "lost":
            self._losses.inc()

    def ended_without_attempt(self, state: str, error: str = "") -> None:
        """A task came to its end outside of any attempt of this worker: its type is not looked up."""
        self._ended.labels("unknown", state, error).inc()

    def taken_back(self, status: str) -> None:
        """A task of a lost worker is PENDING again, or FAILED."""
        self._taken_back.labels(status).inc()
        if status == "FAILED":
            self.ended_without_attempt(status, "lost_worker")

    def lease_renewed(self, *, done: bool) -> None:
        """A lease was renewed, or could not be."""
        self._renewals.labels("done" if done else "failed").inc()

    # ---- what befalls the worker

    def stream_opened(self) -> None:
        """The change stream is open."""
        self._stream_opens.inc()
        self._stream_open.set(1)

    def stream_ended(self, error: StoreError | None = None, *, bug: bool = False) -> None:
        """The change stream is no longer open."""
        self._stream_open.set(0)
        self._lag.set(math.nan)
        self._reached = None
        self._stream_ends.labels(kind_of(error) if error else "bug" if bug else "ended").inc()

    def stream_reached(self, second: int) -> None:
        """The change stream has told everything up to this second of the server."""
        self._reached = second

    def hinted(self, kind: Literal["new", "cancel", "tables", "pending"]) -> None:
        """The change stream told something of interest."""
        self._events.labels(kind).inc()

    def swept(self, seconds: float, *, whole: bool) -> None:
        """A sweep is over; `whole` if no step of it failed."""
        self._sweep.observe(seconds)
        if whole:
            self._swept_at = time.monotonic()

    def sweep_failed(self, step: str) -> None:
        """A step of the sweep failed."""
        self._sweep_failures.labels(step).inc()

    def child_started(self) -> None:
        """A child process was started."""
        self._child_starts.inc()

    def child_ended(self, reason: ChildEnd) -> None:
        """A child process is gone."""
        self._child_ends.labels(reason).inc()

    def database_failed(self, error: StoreError) -> None:
        """An operation of MongoDB raised."""
        self._database_errors.labels(kind_of(error)).inc()

    # ---- what was looked up

    def queue_read(self, state: QueueState) -> None:
        """The queue is in this state."""
        self._clock = state.clock
        self._read_at = time.monotonic()
        self._database_up.set(1)
        self._queue.show(state)
        if self._reached is not None:
            # An event between the stream's last look and the queue's makes it no later than the newest write.
            self._lag.set(max(0, state.written - self._reached))

    def queue_unread(self) -> None:
        """The queue could not be read: what is known of it grows old."""
        self._database_up.set(0)

    def worker(
        self, *, devices: Mapping[str, int], free: Mapping[str, int], running: int, resting: bool, draining: bool
    ) -> None:
        """What this worker has, and what it does."""
        self._devices.show(devices=devices, free=free, running=running, resting=resting, draining=draining)

    def gpus(self, found: tuple[GpuUse, ...]) -> None:
        """The GPUs of this machine, and their use."""
        self._gpus.show(found)

    def _observe_since(self, histogram: Any, then: datetime | None) -> None:
        # Below zero where a fail-over came between two servers whose clocks differ, and by half a round trip.
        if self._clock is not None and then is not None:
            histogram.observe(max(0.0, (self._clock.now() - then).total_seconds()))
