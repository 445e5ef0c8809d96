"""The service, put together: what runs, on what, and in which order it stops."""

import os
import secrets
import signal
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import structlog

from handlers.errors import StartupError
from handlers.images import ImageCache
from handlers.store import Store, connect_store
from handlers.store.database import Document, StoreError, brief, masked
from handlers.store.stream import Hint
from schemas.task import Task
from schemas.version import SCHEMA_VERSION
from service import logs
from service.attempt import Attempt
from service.checks.machine import require_cache
from service.devices import Devices, find_devices
from service.dispatcher import Dispatcher
from service.garbage import collect_rarely
from service.janitor import keep_clean
from service.metrics import Metrics
from service.run_folders import run_folder
from service.runner import Children
from service.secrecy import child_environment, hide_from_children
from service.settings import Settings
from service.sweeper import ADMITTERS, Sweeper
from service.watcher import Watcher
from service.web.site import site

log: structlog.stdlib.BoundLogger = structlog.get_logger()

#: For each index that a start has to make: one on ten million labels takes minutes.
_INDEX_SECONDS = 24 * 3600.0

#: Hints that wait for admission; beyond, the stream waits too.
_HINTS = 1000


def run(settings: Settings, *, once: bool = False) -> int:
    """Run the service until SIGTERM, or `once` for one task; returns the exit code: 0, or 2 if it could not start."""
    uri = settings.mongodb_uri.get_secret_value()
    story = logs.Story()
    logs.configure(settings.log_format, settings.log_level, mask=lambda text: masked(text, uri), story=story)
    hide_from_children()
    collect_rarely()
    failures: list[StartupError] = []
    # Until `serve` listens to it: the first process of a container would not hear it, and go on to claim tasks.
    signal.signal(signal.SIGTERM, _end_start)
    try:
        anyio.run(serve, settings, story, once)
    except* StartupError as errors:
        failures = [error for error in errors.exceptions if isinstance(error, StartupError)]
    except* SystemExit:
        log.info("service stopped", reason="SIGTERM before it was ready")
        # Not after whatever a thread still waits for: the count of the GPUs takes minutes where a driver hangs.
        os._exit(0)
    for failure in failures:
        log.error("cannot start", reason=str(failure))
    return 2 if failures else 0


def _end_start(number: int, frame: object) -> None:
    raise SystemExit


async def serve(settings: Settings, story: logs.Story, once: bool) -> None:
    """Serve until SIGTERM or SIGINT, or with `once` until one task has been run. Raises StartupError."""
    uri = settings.mongodb_uri.get_secret_value()
    # Unique for each start of a process: pod names and process numbers come back, and a fence must not.
    owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    structlog.contextvars.bind_contextvars(owner=owner)
    metrics = Metrics()
    async with connect_store(
        uri, settings.database, lease_seconds=settings.lease_seconds, failed=metrics.database_failed
    ) as store:
        try:
            await store.database.check()
            await store.indexes.create(seconds=_INDEX_SECONDS)
        except StoreError as error:
            raise StartupError(f"MongoDB went away while starting: {brief(error)}") from error
        devices = await find_devices(settings)
        await anyio.to_thread.run_sync(require_cache, settings.cache_dir)
        with run_folder(settings.cache_dir, owner) as runs:
            await _serve(settings, story, store, devices, owner, runs, metrics, once=once)
    log.info("service stopped")


async def _serve(
    settings: Settings,
    story: logs.Story,
    store: Store,
    devices: Devices,
    owner: str,
    runs: Path,
    metrics: Metrics,
    *,
    once: bool,
) -> None:
    environment = child_environment(settings.mongodb_uri.get_secret_value())
    cache = ImageCache(settings.cache_dir / "images", max_bytes=settings.cache_bytes)
    new_hints, hints_to_admit = anyio.create_memory_object_stream[Hint](_HINTS)
    with new_hints, hints_to_admit:
        async with anyio.create_task_group() as background:
            children = Children(settings.child_command, environment, background, metrics=metrics, once=once)

            def make_attempt(task: Task, taken: tuple[str, ...]) -> Attempt:
                return Attempt(
                    task,
                    taken,
                    store=store,
                    cache=cache,
                    children=children,
                    story=story,
                    runs=runs,
                    all_devices=devices,
                    grace_seconds=settings.grace_seconds,
                    silence_seconds=settings.child_silence_seconds,
                    metrics=metrics,
                )

            dispatcher = Dispatcher(
                store,
                devices,
                owner=owner,
                poll_seconds=settings.sweep_seconds,
                make_attempt=make_attempt,
                metrics=metrics,
                min_device_num=settings.min_device_num,
                once=once,
            )
            sweeper = Sweeper(
                store,
                owner=owner,
                every_seconds=settings.sweep_seconds,
                wake=dispatcher.wake,
                describe=lambda: _describe(settings, store, devices, dispatcher),
                story=story,
                metrics=metrics,
            )

            async def cancel(key: Any) -> None:
                dispatcher.cancel(key)
                await sweeper.cancel(key)

            watcher = Watcher(
                store,
                new=new_hints,
                sweep_all=sweeper.sweep_all,
                cancel=cancel,
                wake=dispatcher.wake,
                metrics=metrics,
            )

            def why_not_ready() -> str:
                if dispatcher.draining:
                    return "draining"
                if not sweeper.connected:
                    return "the database does not answer"
                if not watcher.opened.is_set():
                    return "the change stream is not open"
                return "resting after a fault of this machine" if dispatcher.resting else ""

            def look() -> None:
                metrics.worker(
                    devices=devices.total,
                    free=dispatcher.free,
                    running=len(dispatcher.running),
                    resting=dispatcher.resting,
                    draining=dispatcher.draining,
                )

            background.start_soon(_drain_on_signal, dispatcher)
            background.start_soon(watcher.run)
            for _ in range(ADMITTERS):
                background.start_soon(sweeper.admit_from, hints_to_admit)
            background.start_soon(sweeper.run)
            background.start_soon(keep_clean, store, cache)
            try:
                # A worker without devices admits, sweeps and shows, and would keep torch in memory for nothing.
                if any(devices.total.values()):
                    await children.warm_up()
            except OSError as error:
                raise StartupError(f"DLTASK_CHILD_COMMAND cannot be started: {error}") from error
            try:
                web = site(settings, store, metrics, environment=environment, why_not_ready=why_not_ready, look=look)
                async with web:
                    log.info(
                        "service ready",
                        version=version("dltask"),
                        database=settings.database,
                        devices=devices.total,
                        gpu_fallback=devices.fallback,
                    )
                    # Returns once drained: attempts first, since they need the watcher, the leases and the database.
                    await dispatcher.run()
            finally:
                with anyio.CancelScope(shield=True):
                    await children.close()
                    try:
                        # Briefly: a pod that stops has not the time for a database that is away.
                        with store.database.looking():
                            await sweeper.tell_late()
                            await store.workers.leave(owner)
                    except StoreError as error:
                        log.info("worker not taken off the list", reason=brief(error))
                background.cancel_scope.cancel()


async def _drain_on_signal(dispatcher: Dispatcher) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("service draining", signal=signal.Signals(number).name, running=sorted(dispatcher.running))
            dispatcher.drain()


def _describe(settings: Settings, store: Store, devices: Devices, dispatcher: Dispatcher) -> Document:
    """What DL_WORKER says of this worker."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "version": version("dltask"),
        "schema_version": SCHEMA_VERSION,
        "lease_seconds": store.tasks.lease_seconds,
        "devices": dict(devices.total),
        "free": dispatcher.free,
        "fallback": devices.fallback,
        "min_device_num": settings.min_device_num,
        "running": sorted(dispatcher.running),
        "resting": dispatcher.resting,
    }
