"""The gauges whose values are looked up: the queue, this worker's devices, the GPUs of the machine."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Gauge

from handlers.store.queue import Need, QueueState
from schemas.enums import DeviceClass
from service.gpus import GpuUse

#: Numbers of devices that get a series of their own; beyond, `more`: a client can ask for 65,535 different ones.
_OWN_SERIES = 16

_MIB = 2**20


class QueueGauges:
    """The queue, the same from every worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tasks = Gauge("dltask_tasks", "Tasks that have not ended, by state", ("state",), registry=registry)
        self._backing_off = Gauge(
            "dltask_queue_backing_off", "Waiting tasks whose retry is not due yet", registry=registry
        )
        self._waiting = Gauge(
            "dltask_queue_waiting", "Waiting tasks by the devices they need", ("device", "devices"), registry=registry
        )
        self._unservable = Gauge(
            "dltask_queue_unservable",
            "Waiting tasks that no live worker has the devices for",
            ("device", "devices"),
            registry=registry,
        )
        self._oldest = Gauge(
            "dltask_queue_oldest_seconds",
            "How long the task waits that has been due for longest, by device and whether a live worker can take it",
            ("device", "servable"),
            registry=registry,
        )
        self._claimable = Gauge(
            "dltask_queue_claimable_seconds",
            "How long the task waits that has been due for longest, of those that a worker has the devices free for",
            ("device",),
            registry=registry,
        )
        self._workers = Gauge("dltask_workers", "Workers that have renewed within a minute", registry=registry)

    def show(self, state: QueueState) -> None:
        """Show this state, and nothing of an older one."""
        for name, number in (("NEW", state.new), ("PENDING", state.pending), ("RUNNING", state.running)):
            self._tasks.labels(name).set(number)
        self._backing_off.set(state.backing_off)
        _show_needs(self._waiting, state.waiting)
        _show_needs(self._unservable, state.unservable)
        self._oldest.clear()
        for kind in DeviceClass:
            for servable in ("yes", "no"):
                self._oldest.labels(kind.name, servable).set(0)
            self._claimable.labels(kind.name).set(state.claimable.get(kind.name, 0))
        for (name, served), seconds in state.oldest.items():
            self._oldest.labels(name, "yes" if served else "no").set(seconds)
        self._workers.set(state.workers)


def _show_needs(gauge: Gauge, needs: Mapping[Need, int]) -> None:
    gauge.clear()
    for need, number in needs.items():
        devices = str(need.number) if 0 < need.number <= _OWN_SERIES else "more" if need.number > 0 else "none"
        gauge.labels(need.kind, devices).inc(number)


class DeviceGauges:
    """What this worker has, and what it does with it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._devices = Gauge("dltask_devices", "Devices of this worker", ("device",), registry=registry)
        self._free = Gauge(
            "dltask_devices_free",
            "Devices of this worker that it would claim a task for now",
            ("device",),
            registry=registry,
        )
        self._running = Gauge("dltask_attempts_running", "Attempts that run on this worker", registry=registry)
        self._resting = Gauge(
            "dltask_worker_resting",
            "Whether nothing is claimed for now, after a fault of the machine",
            registry=registry,
        )
        self._draining = Gauge("dltask_worker_draining", "Whether this worker stops", registry=registry)

    def show(
        self, *, devices: Mapping[str, int], free: Mapping[str, int], running: int, resting: bool, draining: bool
    ) -> None:
        """Show what is so now."""
        for kind, number in devices.items():
            self._devices.labels(kind).set(number)
            self._free.labels(kind).set(free[kind])
        self._running.set(running)
        self._resting.set(resting)
        self._draining.set(draining)


class GpuGauges:
    """The GPUs that this worker's machine, or container, sees. No series where there is none."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("gpu", "uuid")
        self._total = Gauge("dltask_gpu_memory_bytes", "Memory of a GPU", labels, registry=registry)
        self._used = Gauge(
            "dltask_gpu_memory_used_bytes", "Memory of a GPU in use by anybody", labels, registry=registry
        )
        self._busy = Gauge(
            "dltask_gpu_busy_ratio", "Share of the last moment that a GPU worked", labels, registry=registry
        )

    def show(self, found: tuple[GpuUse, ...]) -> None:
        """Show these, each value that is known."""
        for gauge in (self._total, self._used, self._busy):
            gauge.clear()
        for gpu in found:
            for gauge, value, unit in (
                (self._total, gpu.memory_mib, _MIB),
                (self._used, gpu.used_mib, _MIB),
                (self._busy, gpu.busy_percent, 0.01),
            ):
                if value is not None:
                    gauge.labels(gpu.index, gpu.uuid).set(value * unit)
