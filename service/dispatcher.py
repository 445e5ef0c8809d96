"""The dispatcher: claims what fits into the free devices, and runs every claimed task as one attempt."""

import math
from collections.abc import Callable

import anyio
import structlog
from anyio.abc import TaskGroup
from pydantic import ValidationError

from handlers.store import Store
from handlers.store.database import OPERATION_TIMEOUT_MS, Document, StoreError, brief
from handlers.store.tasks import TaskError
from schemas.params import shown
from schemas.task import Task, same, task_name
from service.attempt import Attempt, Ending
from service.devices import Devices
from service.metrics import Metrics

log: structlog.stdlib.BoundLogger = structlog.get_logger()

#: Seconds that a task which needs several devices stands first in the queue until devices are kept free for it.
PATIENCE_SECONDS = 60.0

#: Seconds for which a worker claims nothing after a fault of its machine; doubled with each further one, to a limit.
_REST_SECONDS, _LONGEST_REST_SECONDS = 5.0, 300.0

#: Seconds for which a worker of one task looks for it while the database answers.
ONCE_SECONDS = 10.0

#: Seconds after a claim that raised during which the server may still carry it out.
_UNSURE_SECONDS = OPERATION_TIMEOUT_MS / 1000


class Dispatcher:
    """Claims and runs. `wake` is a hint that there may be work; without one it looks every `poll_seconds`.

    `once`: takes up one task at most, looks for it no longer than `once_seconds`, and is over when the task is. Tasks
    that need fewer than `min_device_num` devices are left to other workers.
    """

    def __init__(
        self,
        store: Store,
        devices: Devices,
        *,
        owner: str,
        poll_seconds: float,
        make_attempt: Callable[[Task, tuple[str, ...]], Attempt],
        metrics: Metrics,
        min_device_num: int = 1,
        once: bool = False,
        patience_seconds: float = PATIENCE_SECONDS,
        once_seconds: float = ONCE_SECONDS,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._devices = devices
        self._owner = owner
        self._poll_seconds = poll_seconds
        self._make_attempt = make_attempt
        self._min_device_num = min_device_num
        self._once = once
        self._patience_seconds = patience_seconds
        self._once_seconds = once_seconds
        #: Whether a task has been taken up, ever.
        self._taken = False
        self._woken = anyio.Event()
        self._draining = False
        self._rests = 0
        self._rests_until = 0.0
        #: Until when a task may run in our name of which we have not been told.
        self._unsure_until = -math.inf
        self._attempts: list[Attempt] = []

    @property
    def running(self) -> list[str]:
        """`task_id/attempt` of each attempt that runs."""
        return [f"{attempt.task.task_id}/{attempt.task.attempt}" for attempt in self._attempts]

    @property
    def draining(self) -> bool:
        """Whether it claims no more for good."""
        return self._draining

    @property
    def resting(self) -> bool:
        """Whether nothing is claimed for now, after a fault of this machine."""
        return anyio.current_time() < self._rests_until

    @property
    def free(self) -> dict[str, int]:
        """The devices of each kind that it would claim a task for now.

        None while it rests or drains or runs a task alone, once it has had its only one, or where fewer are free than
        it takes tasks for.
        """
        free = self._devices.free()
        return {kind: number if self._claims and number >= self._min_device_num else 0 for kind, number in free.items()}

    @property
    def _claims(self) -> bool:
        """Whether it would claim anything now, if it had the devices."""
        alone = any(attempt.task.runs_alone for attempt in self._attempts)
        return not (self._draining or self.resting or alone or (self._once and self._taken))

    def wake(self) -> None:
        """There may be a task to claim."""
        self._woken.set()

    def drain(self) -> None:
        """Claim no more, and let every running task go back to the queue."""
        self._draining = True
        for attempt in self._attempts:
            attempt.end(Ending.DRAINED)
        self.wake()

    def cancel(self, key: object) -> None:
        """End the running task with this `_id`, if it is ours: its client asked for that."""
        for attempt in self._attempts:
            if same(attempt.task.key, key):
                attempt.end(Ending.CANCELLED)

    async def run(self) -> None:
        """Claim and run until drained, or `once` until no more is to be taken; and until what runs has ended."""
        look_until = anyio.current_time() + self._once_seconds
        async with anyio.create_task_group() as attempts:
            while not self._draining and not self._enough(max(look_until, self._unsure_until)):
                self._woken = anyio.Event()
                try:
                    await self._take_up(attempts)
                    await self._claim_all(attempts)
                except StoreError as error:
                    self._unsure_until = anyio.current_time() + _UNSURE_SECONDS
                    log.warning("claim failed", reason=brief(error))
                except Exception:
                    # What one document can do to a claim must not end the worker, and all that runs beside it.
                    self._unsure_until = anyio.current_time() + _UNSURE_SECONDS
                    log.exception("bug in claim")
                # Whichever is first: a hint, a freed device, or the next poll.
                with anyio.move_on_after(self._poll_seconds):
                    await self._woken.wait()
            # What a claim took although it raised must not run in the name of nobody.
            try:
                await self._take_up(attempts)
            except StoreError as error:
                log.warning("last claim not taken up", reason=brief(error))

    def _enough(self, look_until: float) -> bool:
        """Whether a worker of one task has had it, or has looked for it long enough."""
        if not self._once:
            return False
        if self._taken:
            log.info("once task taken")
            return True
        if anyio.current_time() >= look_until:
            log.info("once no task", seconds=self._once_seconds)
            return True
        return False

    async def _take_up(self, attempts: TaskGroup) -> None:
        """Run what a claim took although it raised. Drained, such an attempt gives its task back at once."""
        if anyio.current_time() > self._unsure_until:
            return
        for document in await self._store.tasks.running_of(self._owner):
            if not any(_is_of(attempt.task, document) for attempt in self._attempts):
                name, attempt = task_name(document.get("task_id")), document.get("attempt")
                log.warning("claim found without its answer", task_id=name, attempt=attempt)
                await self._start(attempts, document)

    async def _claim_all(self, attempts: TaskGroup) -> None:
        while self._claims:
            free, idle = await self._claimable(), not self._attempts
            document = await self._store.tasks.claim(self._owner, free, idle=idle, least=self._min_device_num)
            if document is None:
                return
            await self._start(attempts, document)

    async def _claimable(self) -> dict[str, int]:
        """The free devices of each kind, less those that are kept free for a task that has waited long."""
        free = self._devices.free()
        for kind, total in self._devices.total.items():
            if not self._attempts or free[kind] == 0:
                continue
            head = await self._store.tasks.head(kind, total, self._patience_seconds, least=self._min_device_num)
            if head is None or not head.waited_long:
                continue
            if head.runs_alone:
                return {}
            if head.needed > free[kind]:
                free[kind] = 0
                if self._devices.fallback:
                    # One pool for both kinds: tasks of the other one would take what is kept free.
                    return {}
        return free

    async def _start(self, attempts: TaskGroup, document: Document) -> None:
        one_too_many = self._once and self._taken
        self._taken = True
        try:
            task = Task.from_document(document)
        except ValueError as error:
            # Changed by hand since its admission, or never admitted whatever it says of itself.
            reason = f"the document is no task any more, somebody has changed it: {_first_line(error)}"
            await self._store.tasks.refuse(document, self._owner, TaskError("document", reason))
            self._metrics.ended_without_attempt("FAILED", "document")
            name = task_name(document.get("task_id"))
            log.error("task failed", task_id=name, kind="document", reason=reason)  # noqa: TRY400
            return
        self._metrics.claimed(task.task_type, task.attempt, task.create_time)
        devices = self._devices.take(task.params.device_type.name, task.params.device_num)
        attempt = self._make_attempt(task, devices)
        for other in self._attempts:
            if same(other.task.key, task.key) or other.task.task_id == task.task_id:
                # Deleted and inserted again, or taken from us: what runs of it is nobody's, though it may not know yet.
                other.end(Ending.LOST)
        self._attempts.append(attempt)
        if self._draining or one_too_many or len(devices) < task.params.device_num:
            # Fewer, or too many: a claim that was carried out late, when another had taken the devices or the place.
            attempt.end(Ending.DRAINED)
        attempts.start_soon(self._run_attempt, attempt)

    def _rest_after(self, attempt: Attempt) -> None:
        """Leave the queue to others for a while if this machine failed.

        Tasks fail fast where no space is left on the disk: a worker that went on claiming would be the first at every
        task, and use up the attempts of one after the other.
        """
        if not attempt.machine_failed:
            self._rests = 0
            return
        seconds = min(_REST_SECONDS * 2**self._rests, _LONGEST_REST_SECONDS)
        self._rests += 1
        self._rests_until = anyio.current_time() + seconds
        log.warning("worker resting", seconds=seconds)

    async def _run_attempt(self, attempt: Attempt) -> None:
        try:
            await attempt.run()
        except Exception:
            # Its lease runs out, and somebody takes the task back; those beside it go on.
            log.exception("bug in attempt", task_id=str(attempt.task.task_id), attempt=attempt.task.attempt)
        finally:
            task = attempt.task
            self._attempts.remove(attempt)
            self._rest_after(attempt)
            self._devices.give_back(task.params.device_type.name, attempt.devices)
            self.wake()


def _is_of(task: Task, document: Document) -> bool:
    """Whether `document` is that of this attempt at this task."""
    found = (document.get("create_time"), document.get("attempt"))
    return same(task.key, document["_id"]) and found == (task.create_time, task.attempt)


def _first_line(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))} is {shown(first['input'])}; {first['msg']}"
    return str(error)
