"""The dispatcher: claims what fits into the free devices, and runs every claimed task as one attempt."""

import math
from collections.abc import Callable

import anyio
import structlog
from anyio.abc import TaskGroup
from pydantic import ValidationError

from handlers.store import Store
from handlers.store.database import OPERATION_TIMEOUT_MS, Document, StoreError, brief
from schemas.params import shown
from schemas.task import Task
from service.attempt import Attempt, Ending
from service.devices import Devices

log: structlog.stdlib.BoundLogger = structlog.get_logger()

#: Seconds that a task which needs several devices stands first in the queue until devices are kept free for it.
PATIENCE_SECONDS = 60.0

#: Seconds after a claim that raised during which the server may still carry it out.
_UNSURE_SECONDS = OPERATION_TIMEOUT_MS / 1000


class Dispatcher:
    """Claims and runs. `wake` is a hint that there may be work; without one it looks every `poll_seconds`."""

    def __init__(
        self,
        store: Store,
        devices: Devices,
        *,
        owner: str,
        poll_seconds: float,
        make_attempt: Callable[[Task, tuple[str, ...]], Attempt],
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._store = store
        self._devices = devices
        self._owner = owner
        self._poll_seconds = poll_seconds
        self._make_attempt = make_attempt
        self._patience_seconds = patience_seconds
        self._woken = anyio.Event()
        self._draining = False
        #: Until when a task may run in our name of which we have not been told.
        self._unsure_until = -math.inf
        self.running: dict[str, Attempt] = {}

    def wake(self) -> None:
        """There may be a task to claim."""
        self._woken.set()

    def drain(self) -> None:
        """Claim no more, and let every running task go back to the queue."""
        self._draining = True
        for attempt in self.running.values():
            attempt.end(Ending.DRAINED)
        self.wake()

    def cancel(self, key: object) -> None:
        """End the running task with this `_id`, if it is ours: its client asked for that."""
        for attempt in self.running.values():
            if attempt.task.key == key:
                attempt.end(Ending.CANCELLED)

    async def run(self) -> None:
        """Claim and run until drained, and until what runs has ended."""
        async with anyio.create_task_group() as attempts:
            while not self._draining:
                self._woken = anyio.Event()
                try:
                    await self._take_up(attempts)
                    await self._claim_all(attempts)
                except StoreError as error:
                    self._unsure_until = anyio.current_time() + _UNSURE_SECONDS
                    log.warning("claim failed, trying again", reason=brief(error))
                # Whichever is first: a hint, a freed device, or the next poll.
                with anyio.move_on_after(self._poll_seconds):
                    await self._woken.wait()
            try:
                await self._take_up(attempts)
            except StoreError as error:
                log.warning("what the last claim took is left to its lease", reason=brief(error))

    async def _take_up(self, attempts: TaskGroup) -> None:
        """Run what a claim took although it raised. Drained, such an attempt gives its task back at once."""
        if anyio.current_time() > self._unsure_until:
            return
        for document in await self._store.tasks.running_of(self._owner):
            if not any(
                attempt.task.key == document["_id"] and attempt.task.attempt == document.get("attempt")
                for attempt in self.running.values()
            ):
                log.warning(
                    "task claimed without an answer", key=shown(document["_id"]), attempt=document.get("attempt")
                )
                self._start(attempts, document)

    async def _claim_all(self, attempts: TaskGroup) -> None:
        while not self._draining:
            document = await self._store.tasks.claim(self._owner, await self._claimable())
            if document is None:
                return
            self._start(attempts, document)

    async def _claimable(self) -> dict[str, int]:
        """The free devices of each kind, less those that are kept free for a task that has waited long."""
        free = self._devices.free()
        for kind, total in self._devices.total.items():
            if total > 1 and 0 < free[kind] < total:
                head = await self._store.tasks.head(kind, total, self._patience_seconds)
                if head is not None:
                    needed, waited_long = head
                    if waited_long and needed > free[kind]:
                        free[kind] = 0
                        if self._devices.fallback:
                            # One pool for both kinds: tasks of the other one would take what is kept free.
                            return {}
        return free

    def _start(self, attempts: TaskGroup, document: Document) -> None:
        try:
            task = Task.from_document(document)
        except (ValidationError, ValueError, KeyError, TypeError):
            # Somebody changed an admitted document by hand. The lease runs out, and `max_attempts` ends it.
            log.exception("an admitted document is no task any more", key=shown(document["_id"]))
            return
        devices = self._devices.take(task.params.device_type.name, task.params.device_num)
        attempt = self._make_attempt(task, devices)
        self.running[f"{task.task_id}/{task.attempt}"] = attempt
        if self._draining or len(devices) < task.params.device_num:
            # Fewer: a claim that was carried out late, when the devices had gone to another task.
            attempt.end(Ending.DRAINED)
        attempts.start_soon(self._run_attempt, attempt)

    async def _run_attempt(self, attempt: Attempt) -> None:
        try:
            await attempt.run()
        finally:
            task = attempt.task
            del self.running[f"{task.task_id}/{task.attempt}"]
            self._devices.give_back(task.params.device_type.name, attempt.devices)
            self.wake()
