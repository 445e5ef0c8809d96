"""The sweep: looks at the collection itself from time to time, and repairs whatever a hint missed."""

import time
from collections.abc import Callable
from contextlib import aclosing
from datetime import datetime
from typing import Any

import anyio
import structlog
from anyio.streams.memory import MemoryObjectReceiveStream

from handlers.admission import admit
from handlers.errors import LostTask
from handlers.store import Store
from handlers.store.database import Document, StoreError, away, brief, refused
from handlers.store.stream import Hint
from handlers.store.tasks import Rejection
from schemas.enums import TaskErrorCode
from schemas.params import shown
from schemas.task import task_name
from schemas.version import SCHEMA_VERSION
from service.attempt import quiet_renew_seconds
from service.logs import Story
from service.metrics import Metrics

log: structlog.stdlib.BoundLogger = structlog.get_logger()

#: Documents admitted by one sweep at most, and seconds after which it leaves the rest to the next: a storm, or long
#: lists of ids, must not keep it from the expired leases, nor from saying that this worker lives.
_BATCH, _ADMIT_SECONDS = 1000, 10.0

#: Admissions at once.
ADMITTERS = 4


class Sweeper:
    """Admits what is new, ends what is cancelled, takes back what lost its worker, and says that this worker lives."""

    def __init__(
        self,
        store: Store,
        *,
        owner: str,
        every_seconds: float,
        wake: Callable[[], None],
        describe: Callable[[], Document],
        story: Story,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._story = story
        self._owner = owner
        self._every_seconds = every_seconds
        self._wake = wake
        self._describe = describe
        #: Since when every call has been answered; None after an error.
        self._connected_since: float | None = None
        #: Whether an admission has failed since the last look at all documents: a copy of an old document carries a
        #: state, and no other sweep would find it.
        self._missed = False
        #: The one that runs, or ran last.
        self._step = ""
        self._steps = (
            self._renew,
            self._recover,
            self.tell_late,
            self._admit_new,
            self._cancel_waiting,
            self._sweep_missed,
        )

    @property
    def connected(self) -> bool:
        """Whether the last sweep was answered."""
        return self._connected_since is not None

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            try:
                await self.sweep()
                if self._connected_since is None:
                    self._connected_since = time.monotonic()
            except StoreError as error:
                self._connected_since = None
                log.warning("sweep failed", step=self._step, reason=brief(error))
            await anyio.sleep(self._every_seconds)

    async def sweep(self) -> None:
        """One sweep, each step of it whatever became of those before. Raises StoreError while the database is away."""
        began, whole = time.monotonic(), True
        for step in self._steps:
            name = self._step = step.__name__.strip("_")
            try:
                await step()
                continue
            except StoreError as error:
                if away(error):
                    self._metrics.sweep_failed(name)
                    raise
                log.error("sweep step failed", step=name, reason=brief(error))  # noqa: TRY400
            except Exception:
                # A document that nobody thought of must not keep all others from being looked after.
                log.exception("bug in sweep step", step=name)
            whole = False
            self._metrics.sweep_failed(name)
        self._metrics.swept(time.monotonic() - began, whole=whole)
        self._wake()

    async def sweep_all(self) -> None:
        """Look for documents that carry a state of somebody else's too, and for indexes that are gone.

        After a start, after lost history, and after a collection was dropped or renamed. Raises StoreError.
        """
        self._missed = False
        done = False
        try:
            # Indexes first: the look for copies reads one from end to end.
            for problem in await self._store.indexes.mend():
                log.error("index missing", reason=problem)
            await self._admit_copies()
            if newer := await self._store.tasks.not_understood():
                log.warning("tasks of a newer version left alone", tasks=newer, schema_version=SCHEMA_VERSION)
            done = True
        finally:
            # Not `not done`: one of the admitters may have missed one meanwhile.
            self._missed = self._missed or not done
        self._wake()

    async def _renew(self) -> None:
        await self._store.workers.renew(self._owner, self._describe())

    async def _admit_new(self) -> None:
        until = time.monotonic() + _ADMIT_SECONDS
        for key in await self._store.tasks.new_keys(_BATCH):
            await self.admit(key)
            if time.monotonic() > until:
                return  # the rest by the next sweep, which is due

    async def _sweep_missed(self) -> None:
        if self._missed:
            await self.sweep_all()

    async def _cancel_waiting(self) -> None:
        await self.cancel()

    async def _admit_copies(self) -> None:
        async with aclosing(self._store.tasks.copied_keys()) as keys:
            async for key in keys:
                await self.admit(key)

    async def cancel(self, key: Any = None) -> None:
        """End the task with this `_id`, or each, that waits and whose client asked for that."""
        for task_id in await self._store.tasks.cancel_waiting(key):
            self._metrics.ended_without_attempt("CANCELLED")
            log.info("task cancelled", task_id=task_name(task_id))

    async def admit_from(self, hints: MemoryObjectReceiveStream[Hint]) -> None:
        """Admit documents as the watcher names them, until cancelled."""
        async for hint in hints:
            key = hint.key
            try:
                await self.admit(key, inserted=hint.written)
                self._wake()
            except StoreError as error:
                self._missed = True
                log.warning("admission failed", key=shown(key), reason=brief(error))
            except Exception:
                log.exception("bug in admission", key=shown(key))

    async def admit(self, key: Any, *, inserted: datetime | None = None) -> None:
        """Answer one new document, `inserted` then as far as is known. Raises StoreError while the database is away."""
        try:
            code = await self._admit(key)
            if code is not None:
                self._metrics.admitted(code, inserted)
        except StoreError as error:
            if away(error):
                raise
            # It must not keep those after it from their answer: no answer fits beside an `_id` of 8 MB, say. One that
            # was not refused for good is tried again, by a look that finds copies too.
            self._missed = self._missed or not refused(error)
            log.error("document not answered", key=shown(key), reason=brief(error))  # noqa: TRY400

    async def _admit(self, key: Any) -> TaskErrorCode | None:
        try:
            return await admit(self._store, key)
        except StoreError:
            raise
        except Exception:
            # What a hostile document can do to admission it must do once, not to every worker at every sweep.
            log.exception("bug in admission", key=shown(key))
            fault = Rejection(
                TaskErrorCode.PARAM_INVALID, "", "the document cannot be understood; the worker's log has a traceback"
            )
            return fault.code if await self._store.tasks.reject(key, fault) else None

    def _may_judge(self) -> bool:
        """Whether other owners have had the time to renew.

        After an outage every lease has expired, and the first worker to be connected again must not take the tasks of
        all others: it waits for two renewal intervals without an error.
        """
        since = self._connected_since
        quiet = quiet_renew_seconds(self._store.tasks.lease_seconds)
        return since is not None and time.monotonic() - since >= 2 * quiet

    async def _end_session(self, owner: Any) -> None:
        """Free what a worker that is gone holds: one that was killed in the middle of a transaction left it open."""
        try:
            await self._store.workers.end_session(owner)
        except StoreError as error:
            if away(error):
                raise
            # Another user's, say. The server ends it in time.
            log.warning("session not ended", lost_owner=shown(owner), reason=brief(error))

    async def tell_late(self) -> None:
        """Store the last log lines of attempts that ended while the database was away, or whose worker is gone.

        Raises StoreError.
        """
        while self._story.left:
            task_id, lines = self._story.left.popleft()
            try:
                await self._store.traces.append_log(task_id, lines)
            except StoreError as error:
                if not refused(error):
                    self._story.left.appendleft((task_id, lines))
                raise

    async def _recover(self) -> None:
        if not self._may_judge():
            return
        expired = await self._store.tasks.expired()
        for owner in {shown(lost.owner): lost.owner for lost in expired}.values():
            await self._end_session(owner)
        for lost in expired:
            try:
                with self._store.database.looking():
                    after = await self._store.tasks.recover(lost)
            except LostTask:
                continue  # renewed, or recovered by another worker, in this very moment
            except StoreError as error:
                if away(error):
                    with self._store.database.looking():
                        await self._store.database.now()  # raises if it is not this document alone
                # Changed by hand into something that cannot be counted up, or locked by a transaction that could not be
                # ended: it must not keep the others waiting.
                log.error("task not taken back", task_id=task_name(lost.task_id), reason=brief(error))  # noqa: TRY400
                continue
            self._metrics.taken_back(after.status)
            name = task_name(lost.task_id)
            # Who lost it cannot say so.
            self._story.open(name)
            with structlog.contextvars.bound_contextvars(**lost.trace):
                log.warning(
                    "task taken back",
                    task_id=name,
                    attempt=lost.attempt,
                    lost_owner=lost.owner,
                    status=after.status,
                    failures=after.failures,
                )
            # By the next step: an error here would lose the lines, and keep the other leases waiting.
            self._story.left.append((lost.task_id, self._story.close(name)))
