"""The janitor: removes what nothing refers to any more, on this machine's disk and in GridFS.

The rule: a file that a task wrote (its metadata says which) and that no task document and no model names is removed a
day after a janitor first found it so; and so are chunks without a file, which a crash in the middle of an upload
leaves. A day, so that an upload under way, or one whose document is just being written, is never taken for an orphan.
When it was first found is noted in the file (`metadata.orphan_since`) or in its first chunk (`orphan_since`) with the
server's time, because no other date can be trusted: the ids and dates of GridFS are made by the clocks of workers and
clients.
"""

import anyio
import structlog

from handlers.images import ImageCache
from handlers.store import Store
from handlers.store.database import StoreError, brief
from handlers.store.files import Bucket

log: structlog.stdlib.BoundLogger = structlog.get_logger()

ORPHAN_SECONDS = 24 * 3600.0
_EVERY_SECONDS = 3600.0


async def keep_clean(store: Store, cache: ImageCache) -> None:
    """Clean up now and every hour, until cancelled."""
    while True:
        try:
            await cache.forget()
            if removed := await remove_orphans(store, older_than=ORPHAN_SECONDS):
                log.info("orphaned files removed", files=removed)
        except StoreError as error:
            log.warning("clean-up failed", reason=brief(error))
        except Exception:
            log.exception("bug in clean-up")
        await anyio.sleep(_EVERY_SECONDS)


async def remove_orphans(store: Store, *, older_than: float) -> int:
    """Remove files that were first found orphaned `older_than` seconds ago; returns how many. Raises StoreError."""
    removed = 0
    files = store.files
    for bucket in (files.models, files.messages, files.reports):
        removed += await _remove_files(store, bucket, older_than)
        removed += await remove_chunks(bucket, older_than=older_than)
    return removed


async def remove_chunks(bucket: Bucket, *, older_than: float) -> int:
    """Remove what cut off uploads left in `bucket`, if it is so many seconds old; returns how many. Raises StoreError.

    The images are not the janitor's, lest each worker need the right to remove them: an import does this for them.
    """
    orphans = await bucket.orphan_chunks(older_than)
    for file_id in orphans:
        await bucket.delete_chunks(file_id)
    return len(orphans)


async def _remove_files(store: Store, bucket: Bucket, older_than: float) -> int:
    orphans = []
    async for owners in bucket.ours():
        task_ids = list(owners.values())
        named = await store.tasks.files_named(task_ids, [str(file_id) for file_id in owners])
        named |= await store.models.files_named(task_ids)
        await bucket.not_orphaned([file_id for file_id in owners if str(file_id) in named])
        # A newer version may name files in fields that this one does not know.
        newer = await store.tasks.not_understood_of(task_ids)
        unnamed = [file_id for file_id, task_id in owners.items() if str(file_id) not in named and task_id not in newer]
        orphans += await bucket.orphaned(unnamed, older_than)
    for file_id in orphans:
        await bucket.delete(file_id)
    return len(orphans)
