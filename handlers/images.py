"""Images on local disk: fetched from GridFS once, kept for the next task, linked into the folder of each run."""

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import orjson
import structlog
from bson import ObjectId

from handlers.errors import TemporaryError
from handlers.store import Store
from handlers.store.files import FileMissing

log: structlog.stdlib.BoundLogger = structlog.get_logger()

#: Downloads at once: enough to hide the round trip, few enough to leave the connection pool to the renewals.
_PARALLEL = 16

#: Images looked up in one go, so that a data set of any size needs little memory.
_BATCH = 512


class ImageCache:
    """A folder of image files by GridFS id, which names the content: a GridFS file never changes under its id.

    A run gets hard links, so that the cache may forget a file that a running child still reads. `folder` and the run
    folders must be on one file system.

    A file of another length than GridFS has, as a power cut leaves, is fetched again. Lengths are compared because that
    costs one query for many images at each run; syncing each file to disk would cost every first run a wait an image.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        #: Bytes that it holds: as last counted, and what came since.
        self._bytes = 0

    async def fetch(self, store: Store, refs: Path, run_folder: Path) -> Path:
        """Put every image of `refs` (see `handlers.message`) into `run_folder`; returns the list for the child.

        An image that GridFS does not have is listed with the reason. Raises TemporaryError when the disk is full, after
        it has forgotten half of what it holds.
        """
        linked = run_folder / "images"
        linked.mkdir()
        listing = run_folder / "images.jsonl"
        try:
            with listing.open("wb") as out:
                for batch in _batches(refs):
                    for row in await self._fetch_batch(store, batch, linked):
                        out.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            await self.forget(half=True)
            raise TemporaryError(
                "disk_full", f"no space left in {self._folder} for images; free some or set DLTASK_CACHE_DIR"
            ) from None
        if self._bytes > self._max_bytes:
            await self.forget()
        return listing

    async def _fetch_batch(self, store: Store, batch: list[dict[str, Any]], linked: Path) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{} for _ in batch]
        limiter = anyio.CapacityLimiter(_PARALLEL)
        wanted = {ObjectId(ref["file_id"]) for ref in batch if ref["file_id"] is not None}
        lengths = await store.files.images.lengths(wanted)

        async def one(position: int, ref: dict[str, Any]) -> None:
            async with limiter:
                rows[position] = await self._fetch_one(store, ref, linked, lengths.get(ref["file_id"]))

        try:
            async with anyio.create_task_group() as group:
                for position, ref in enumerate(batch):
                    group.start_soon(one, position, ref)
        except ExceptionGroup as failures:
            # Many downloads fail of one cause, such as a full disk or a database that is away.
            raise next(_leaves(failures)) from failures
        return rows

    async def _fetch_one(self, store: Store, ref: dict[str, Any], linked: Path, length: Any) -> dict[str, Any]:
        if ref["file_id"] is None:
            return {"id": ref["id"], "reason": "not in IMG_INFO, or without a file_id"}
        # Spread by hash: ObjectIds of one import share their first bytes.
        shard = hashlib.sha256(ref["file_id"].encode()).hexdigest()[:2]
        cached = self._folder / shard / ref["file_id"]
        here = linked / str(ref["id"])
        if not _take(cached, here, length):
            cached.parent.mkdir(parents=True, exist_ok=True)
            # Fetched under a name of this run's own, so that two runs which need one image do not meet.
            try:
                await store.files.images.fetch(ObjectId(ref["file_id"]), here)
            except FileMissing:
                return {"id": ref["id"], "reason": f"file {ref['file_id']} is missing or damaged in GridFS"}
            try:
                os.link(here, cached)
                self._bytes += here.stat().st_size
            except FileExistsError:
                pass
        return {"id": ref["id"], "path": str(here)}

    async def forget(self, *, half: bool = False) -> int:
        """Remove the files longest unused until at most `max_bytes` are kept, or `half` of what there is if less.

        Returns how many were removed.
        """
        removed = await anyio.to_thread.run_sync(self._forget, half)
        if removed:
            log.info("images forgotten", files=removed)
        return removed

    def _forget(self, half: bool) -> int:
        files = []
        for path in self._folder.glob("??/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            files.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in files)
        kept = min(self._max_bytes, total // 2) if half else self._max_bytes
        removed = 0
        for _, size, path in sorted(files):
            if total <= kept:
                break
            path.unlink(missing_ok=True)
            total -= size
            removed += 1
        self._bytes = total
        return removed


def _take(cached: Path, here: Path, length: Any) -> bool:
    """Link the file `cached` to `here` if it is there and whole; one that is not whole is removed."""
    try:
        if cached.stat().st_size != length:
            cached.unlink()
            return False
        os.utime(cached)  # the newest use, for `forget`
        os.link(cached, here)
    except FileNotFoundError:
        return False
    return True


def _batches(refs: Path) -> Iterator[list[dict[str, Any]]]:
    with refs.open("rb") as lines:
        batch: list[dict[str, Any]] = []
        for line in lines:
            batch.append(orjson.loads(line))
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch


def _leaves(group: ExceptionGroup[Any]) -> Iterator[Exception]:
    for error in group.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
