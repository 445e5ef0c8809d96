"""One attempt at one task, from claimed to ended: prepare, run the child, keep the lease, finish.

Every way out of it is one of the `Ending`s; whatever happens, the document is left in a state that somebody goes on
from, and nothing of the child is left.
"""

import secrets
import shutil
import time
from collections import deque
from collections.abc import Awaitable, Callable
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import anyio
import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential_jitter

from handlers import test, train
from handlers.detection import job as child_job
from handlers.errors import LostTask, PermanentError, TemporaryError
from handlers.images import ImageCache
from handlers.prepare import Uploads
from handlers.store import Store
from handlers.store.database import Document, StoreError, brief, refused
from handlers.store.tasks import CANCELLED, TaskError
from schemas.enums import TaskStatus
from schemas.numbers import bson_uint64
from schemas.task import Task
from service.devices import Devices
from service.logs import Story
from service.metrics import Metrics, Outcome
from service.runner import Child, Children

T = TypeVar("T")

log: structlog.stdlib.BoundLogger = structlog.get_logger()

#: Seconds between renewals while there is progress to tell, and while there is none; at most, see below.
RENEW_SECONDS = 2.0
QUIET_RENEW_SECONDS = 10.0

#: How often the server may refuse what an attempt needs of it before its refusal is taken for an answer.
_REFUSALS = 5

#: Seconds that a child has to be gone once it has closed its output, and a release to be written, however short the
#: grace.
_EXIT_SECONDS = 5.0

#: Notes kept for the result, and measurements that wait to be stored: a child gone wild makes more.
_MAX_NOTES = 50
_MAX_MEASURED = 10_000


def quiet_renew_seconds(lease_seconds: float) -> float:
    """Seconds between renewals without progress: a lease of any length outlives three that fail."""
    return min(QUIET_RENEW_SECONDS, lease_seconds / 4)


class Ending(Enum):
    """Why an attempt is being ended from outside."""

    LOST = "lost"
    CANCELLED = "cancelled"
    DRAINED = "drained"


class Attempt:
    """One attempt. `run` never raises for what is wrong with the task."""

    def __init__(
        self,
        task: Task,
        devices: tuple[str, ...],
        *,
        store: Store,
        cache: ImageCache,
        children: Children,
        story: Story,
        runs: Path,
        all_devices: Devices,
        grace_seconds: float,
        silence_seconds: float,
        metrics: Metrics,
    ) -> None:
        self.task = task
        self.devices = devices
        #: Whether it ended by a fault of this machine, which the next task would meet as well.
        self.machine_failed = False
        self._metrics = metrics
        #: How it is over, and the kind of error if there was one; until it is known, its lease will run out.
        self._over: tuple[Outcome, str] = ("abandoned", "")
        self._store = store
        self._cache = cache
        self._children = children
        self._story = story
        # Numbers alone will not do: a task deleted and inserted again can have both of another that still ends.
        self._folder = runs / f"{task.task_id}-{task.attempt}-{secrets.token_hex(4)}"
        self._all_devices = all_devices
        self._grace_seconds = grace_seconds
        #: What a child has to be gone, and a release to be written.
        self._exit_seconds = max(grace_seconds, _EXIT_SECONDS)
        self._silence_seconds = silence_seconds
        self._ending: Ending | None = None
        #: Whether the database is away while the worker stops: each call more would keep it for a time-out.
        self._given_up = False
        self._child: Child | None = None
        #: Whether it has reported anything.
        self._heard = False
        self._preparing = anyio.CancelScope()
        #: Runs out when the child has been silent, or stopping, for too long.
        self._patience = anyio.CancelScope()
        #: The registered model that a TEST runs.
        self._model: Document = {}
        self._progress: dict[str, Any] | None = None
        self._measured: deque[tuple[int, dict[str, float]]] = deque(maxlen=_MAX_MEASURED)
        self._notes: list[str] = []
        self._snapshots: list[Any] = [task.snapshot.file_id] if task.snapshot else []
        self._outcome: child_job.Trained | child_job.Tested | child_job.Failed | child_job.Stopped | None = None
        self._number = bson_uint64(task.task_id)
        self._name = str(task.task_id)
        #: Bound to every line that is logged of this attempt.
        self._context = {"task_id": self._name, "attempt": task.attempt, "owner": task.owner}
        if task.trace is not None:
            self._context |= task.trace.bound
        self._began = time.monotonic()

    # ---- from outside

    def end(self, ending: Ending) -> None:
        """Stop, for this reason; the first one counts. The child may snapshot, unless the task is somebody else's."""
        if self._ending is not None:
            return
        self._ending = ending
        self._preparing.cancel()
        if self._child is not None:
            self._stop(self._child)

    def _stop(self, child: Child) -> None:
        if self._ending is Ending.LOST:
            child.kill()
        else:
            child.terminate()
            self._patience.deadline = anyio.current_time() + self._grace_seconds

    # ---- the attempt

    async def run(self) -> None:
        """Make the attempt and leave the task in its next state."""
        structlog.contextvars.bind_contextvars(**self._context)
        self._story.open(self._name)
        log.info("task claimed", task_type=self.task.task_type, devices=self.devices)
        if self.task.trace_problem is not None:
            log.info("trace ignored", reason=self.task.trace_problem)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._keep_lease)
                await self._work()
                group.cancel_scope.cancel()
        finally:
            self._metrics.attempt_over(self.task.task_type, self._folder.name, *self._over, self._seconds())
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(lambda: shutil.rmtree(self._folder, ignore_errors=True))
                lines = self._story.close(self._name)
                if self._given_up or not await self._tell(lines):
                    self._story.left.append((self._number, lines))

    async def _work(self) -> None:
        """Run the task and write its next state."""
        try:
            try:
                await self._prepare_and_run()
                await self._settle()
            except LostTask:
                raise
            except PermanentError as error:
                await self._fail(TaskError(error.kind, str(error), error.field, error.code))
            except TemporaryError as error:
                # A child that never said that it has its job would not have taken any other one either.
                mute = self._child is not None and not self._heard
                self.machine_failed = mute or error.kind == "disk_full"
                await self._retry(TaskError(error.kind, str(error)), delay=error.delay)
            except StoreError as error:
                # Refused, again and again: whatever outage there was has been sat out.
                await self._fail(TaskError("database", f"MongoDB refuses: {brief(error)}"))
            except OSError as error:
                # A full disk, no more processes: this machine's fault, and another worker may do better.
                self.machine_failed = True
                log.exception("machine failed")
                await self._retry(TaskError("machine", str(error)))
            except Exception:
                # The one broad catch: a bug in a handler ends its task, not the worker and the tasks beside it.
                log.exception("bug in handler")
                await self._fail(TaskError("bug", "a fault of the service; its traceback is in the worker's log"))
        except LostTask:
            self._over = ("lost", "")
            log.warning("task lost")
        except StoreError as error:
            # Nothing can be written of this task. Its lease runs out, and its faults are counted by who takes it back.
            log.error("task not ended", reason=brief(error))  # noqa: TRY400

    async def _prepare_and_run(self) -> None:
        job: child_job.Job | None = None
        with self._preparing:
            job = await self._insist(self._prepare)
        if job is None or self._ending is not None:
            return
        path = self._folder / "job.json"
        path.write_text(job.model_dump_json())
        log.info("data ready", seconds=self._seconds())
        async with self._children.take() as child:
            self._child = child
            await child.give(path, job.out, **self._context)
            if self._ending is not None:
                self._stop(child)
            try:
                await self._listen(child)
            finally:
                # The child after one that has not come to its first iteration.
                if self._ending is not Ending.DRAINED:
                    self._children.warm_up_soon()

    async def _prepare(self) -> child_job.Job:
        """Everything the child needs, in the attempt's folder."""
        # What a try before this one, which the database did not let come to its end, has left.
        await anyio.to_thread.run_sync(lambda: shutil.rmtree(self._folder, ignore_errors=True))
        self._folder.mkdir(parents=True)
        if self.task.task_type == "TRAIN":
            return await train.prepare(self._store, self._cache, self.task, self._folder, self.devices)
        job, self._model = await test.prepare(self._store, self._cache, self.task, self._folder, self.devices)
        return job

    async def _listen(self, child: Child) -> None:
        """Take in what the child reports, until it ends or has made no progress for too long."""
        try:
            # It may have been told to stop before it was listened to.
            patience = self._silence_seconds if self._ending is None else self._grace_seconds
            with anyio.fail_after(patience) as self._patience:
                async for event in child.events():
                    moved = self._has_moved(event)
                    await self._take_in(event)
                    if moved and self._ending is None:
                        self._patience.deadline = anyio.current_time() + self._silence_seconds
        except TimeoutError:
            child.kill()
            if self._ending is None and self._outcome is None:
                raise TemporaryError("hung", f"the child made no progress for {self._silence_seconds:g} s") from None
            log.warning("child killed", grace_seconds=self._grace_seconds)
        code: int | None = None
        with anyio.move_on_after(self._exit_seconds):
            code = await child.wait()
        if code is None:
            # It has said all that it will say, and hangs on its way out. Who closes it makes sure that it is gone.
            child.kill()
            log.warning("child killed", grace_seconds=self._exit_seconds)
        if self._outcome is None and self._ending is None:
            last = child.last_words[-1] if child.last_words else "it said nothing"
            how = f"did not end in {self._exit_seconds:g} s" if code is None else f"ended with {_exit(code)}"
            raise TemporaryError("child_died", f"the child {how}: {last}")

    def _has_moved(self, event: child_job.Event) -> bool:
        """Whether the attempt has got further: a hung child can go on talking, from another of its threads."""
        if isinstance(event, child_job.Progress):
            return self._progress is None or event.iteration != self._progress["iteration"]
        return not isinstance(event, child_job.Note)

    async def _take_in(self, event: child_job.Event) -> None:
        self._heard = True
        match event:
            case child_job.Started():
                log.info(
                    "child started",
                    device=event.device,
                    initial_weights=event.initial_weights,
                    iteration=event.iteration,
                    seconds=self._seconds(),
                )
            case child_job.Progress():
                if self._progress is None:
                    # The next child warms up while this one works. Not earlier: importing torch takes a core for
                    # seconds, and on a small machine keeps this one from its first iteration for as long.
                    self._children.warm_up_soon()
                self._progress = event.model_dump(exclude={"event", "learning_rate"}, exclude_none=True)
                self._progress["max_num_iters"] = bson_uint64(event.max_num_iters)
                self._metrics.progressed(self.task.task_type, self._folder.name, event.images_per_second)
            case child_job.Measured():
                self._measured.append((event.iteration, event.values))
            case child_job.Note():
                if len(self._notes) < _MAX_NOTES:
                    self._notes.append(event.message)
                    log.info("child noted", message=event.message)
            case child_job.Snapshot():
                await self._store_snapshot(event)
            case child_job.Trained() | child_job.Tested() | child_job.Stopped() | child_job.Failed():
                self._outcome = event

    async def _store_snapshot(self, snapshot: child_job.Snapshot) -> None:
        if self._ending is Ending.LOST:
            return
        bucket = self._store.files.models
        try:
            file_id = await bucket.put(snapshot.path, snapshot.path.name, {"task_id": self._number})
            try:
                await self._store.tasks.note_snapshot(self.task, file_id, snapshot.iteration, snapshot.sha256)
            except LostTask:
                await bucket.delete(file_id)
                self.end(Ending.LOST)
                return
            log.info("snapshot stored", iteration=snapshot.iteration)
            self._snapshots.append(file_id)
            # Two are kept: the one that the document names, and the one before it.
            for old in self._snapshots[:-2]:
                await bucket.delete(old)
            del self._snapshots[:-2]
        except (StoreError, OSError) as error:
            # Training goes on: a later snapshot will do, and the lease lives longer than most outages.
            log.warning("snapshot not stored", iteration=snapshot.iteration, reason=brief(error))
        finally:
            snapshot.path.unlink(missing_ok=True)

    # ---- how it ends

    async def _settle(self) -> None:
        """Write the next state, after the child has ended or was never started."""
        outcome = self._outcome
        if self._ending is Ending.LOST:
            raise LostTask(self.task.task_id)
        if isinstance(outcome, child_job.Trained | child_job.Tested):
            # Also after a cancel or a drain that came too late: the work is done, and the first fenced write wins.
            await self._succeed(outcome)
        elif self._ending is Ending.CANCELLED:
            await self._cancelled()
        elif self._ending is Ending.DRAINED:
            await self._release_to_stop()
        elif isinstance(outcome, child_job.Stopped):
            # A fault, lest a child that does so at once be started for ever.
            await self._retry(TaskError("stopped", "the child stopped and was not asked to"))
        elif isinstance(outcome, child_job.Failed):
            await self._child_failed(outcome)

    async def _release_to_stop(self) -> None:
        # Not however long that takes: where the database is away, the lease does the same for the task a little later.
        with anyio.move_on_after(self._exit_seconds):
            await self._insist(lambda: self._store.tasks.release(self.task, "the worker is shutting down"))
            self._over = ("released", "")
            log.info("task released")
            return
        self._given_up = True
        log.warning("task not released", grace_seconds=self._exit_seconds)

    async def _succeed(self, outcome: child_job.Trained | child_job.Tested) -> None:
        kind = self.task.params.device_type.name
        made = outcome.model_copy(update={"device": self._all_devices.named(kind, outcome.device)})
        seconds, notes = self._seconds(), tuple(self._notes)
        uploads = Uploads(self._store, self.task)
        if isinstance(made, child_job.Trained):
            trained = made
            result = await self._insist(
                lambda: train.finish(self._store, self.task, trained, uploads, seconds=seconds, notes=notes)
            )
        else:
            tested = made
            refs = self._folder / "refs.jsonl"
            result = await self._insist(
                lambda: test.finish(
                    self._store,
                    self.task,
                    tested,
                    uploads,
                    model=self._model,
                    refs=refs,
                    seconds=seconds,
                    notes=notes,
                )
            )
        self._over = ("succeeded", "")
        metrics = result.get("metrics") or {}
        log.info(
            "task succeeded",
            model_name=result["model_name"],
            version=result["version"],
            map=metrics.get("map"),
            map_50=metrics.get("map_50"),
            seconds=seconds,
        )

    async def _child_failed(self, failed: child_job.Failed) -> None:
        error = TaskError(failed.kind, failed.message, failed.field)
        if failed.kind == "memory" and self.task.batch_size_limit is None and self.task.params.batch_size > 1:
            # Once: a second failure with half the batch means that the network does not fit at all.
            await self._retry(error, delay=0, batch_size_limit=self.task.params.batch_size // 2)
        elif failed.kind == "machine":
            self.machine_failed = True
            await self._retry(error)
        elif failed.kind == "snapshot":
            await self._insist(lambda: self._store.tasks.drop_snapshot(self.task))
            await self._retry(error, delay=0)
        else:
            await self._fail(error)

    async def _cancelled(self) -> None:
        await self._insist(lambda: self._store.tasks.finish(self.task, TaskStatus.CANCELLED, error=CANCELLED))
        self._over = ("cancelled", "")
        log.info("task cancelled")

    async def _fail(self, error: TaskError) -> None:
        await self._insist(lambda: self._store.tasks.finish(self.task, TaskStatus.FAILED, error=error))
        self._over = ("failed", error.kind)
        log.error("task failed", kind=error.kind, reason=error.message, field=error.field)

    async def _retry(
        self, error: TaskError, *, delay: float | None = None, batch_size_limit: int | None = None
    ) -> None:
        if self._ending is Ending.CANCELLED:
            await self._cancelled()
            return
        after = await self._insist(
            lambda: self._store.tasks.retry(self.task, error, delay=delay, batch_size_limit=batch_size_limit)
        )
        if after.status == TaskStatus.FAILED.name:
            self._over = ("failed", error.kind)
            log.error("task failed", kind=error.kind, reason=error.message, failures=after.failures)
        else:
            self._over = ("retried", error.kind)
            log.warning("task requeued", kind=error.kind, reason=error.message, failures=after.failures)

    async def _insist(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Do what needs the database, however long that is away: hours of work must not be lost to an outage.

        Raises LostTask, and StoreError once the server has refused it again and again.
        """

        refusals = 0

        def given_up(state: RetryCallState) -> bool:
            nonlocal refusals
            refusals = refusals + 1 if refused(_failure(state)) else 0
            return refusals >= _REFUSALS

        async def once() -> T:  # tenacity awaits only what it sees to be a coroutine function, which a lambda is not
            return await operation()

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(StoreError),
            stop=given_up,
            reraise=True,
            wait=wait_exponential_jitter(initial=0.5, max=10),
            sleep=anyio.sleep,
            before_sleep=lambda state: log.warning(
                "database away",
                reason=brief(_failure(state)),
            ),
        )
        return await retrying(once)

    # ---- beside it

    async def _keep_lease(self) -> None:
        """Renew the lease with the newest progress, and learn of a cancel or of a loss by it."""
        renewed = time.monotonic()
        quiet = quiet_renew_seconds(self._store.tasks.lease_seconds)
        told: dict[str, Any] | None = None
        while True:
            await anyio.sleep(min(RENEW_SECONDS, quiet))
            progress = self._progress
            if progress == told and time.monotonic() - renewed < quiet:
                continue
            asked = time.monotonic()
            try:
                cancel = await self._store.tasks.renew(self.task, progress if progress != told else None)
                self._metrics.lease_renewed(done=True)
                # To its end even where the attempt ends meanwhile: what was taken would be stored by nobody.
                with anyio.CancelScope(shield=True):
                    lines = self._story.take(self._name)
                    if not await self._tell(lines):
                        self._story.put_back(self._name, lines)
            except LostTask:
                # The end that this attempt writes itself looks the same from here; then there is no child to kill.
                self.end(Ending.LOST)
                return
            except StoreError as error:
                self._metrics.lease_renewed(done=False)
                log.warning("lease not renewed", reason=brief(error))
                continue
            # From when it was asked for: storing the lines above can take as long as a lease.
            renewed, told = asked, progress
            if cancel:
                self.end(Ending.CANCELLED)

    async def _tell(self, lines: list[str]) -> bool:
        """Store log lines and measurements; False if the database was away, and the lines may be stored later."""
        measured = list(self._measured)
        self._measured.clear()
        told = False
        try:
            await self._store.traces.append_log(self._number, lines)
            told = True
            await self._store.traces.put_measurements(self._number, measured)
        except StoreError as error:
            if refused(error):
                told = True
            else:
                self._measured = deque([*measured, *self._measured], maxlen=_MAX_MEASURED)
            log.warning("traces not stored", reason=brief(error))
        return told

    def _seconds(self) -> float:
        return round(time.monotonic() - self._began, 3)


def _failure(state: RetryCallState) -> StoreError:
    """What the try that tenacity is thinking about has raised: it retries nothing else."""
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, StoreError)
    return error


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
