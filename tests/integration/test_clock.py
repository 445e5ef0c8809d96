"""A worker whose clock is more than a day off loses nothing and takes nothing from others: only the server's counts."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pymongo.database import Database

from handlers.store import Store
from service.janitor import ORPHAN_SECONDS, remove_orphans
from tests.helpers import STANDIN, Service, ended, train_request, wait_for

Db = Database[dict[str, Any]]
Serve = Callable[..., Service]

LIBRARY = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")

#: Without the library, which in Debian's version breaks `time.sleep`; no clock of the child's is used.
CHILD = f"env -u LD_PRELOAD {STANDIN}"

#: Uploads one file as a worker does, and stops in the middle until it may go on.
UPLOAD = """
import sys
from pathlib import Path
import anyio
from handlers.store import connect_store

async def main(uri, database, path):
    async with connect_store(uri, database) as store:
        bucket = store.files.models
        call, blocks = store.database.call, []

        async def slow(operation, *args, **kwargs):
            if args and isinstance(args[0], bytes):
                blocks.append(1)
                if len(blocks) == 52:  # PyMongo holds back 48 MB
                    print("under way", flush=True)
                    await anyio.to_thread.run_sync(sys.stdin.readline)
            return await call(operation, *args, **kwargs)

        store.database.call = slow
        print(await bucket.put(Path(path), "x", {"task_id": 1}), flush=True)

anyio.run(main, *sys.argv[1:])
"""


@pytest.fixture
def off_by() -> Callable[[int], dict[str, str]]:
    """The environment of a process whose clock is so many hours off (Debian's package faketime)."""
    if not LIBRARY.exists():
        reason = f"{LIBRARY} is not there; install Debian's package faketime"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return lambda hours: {"LD_PRELOAD": str(LIBRARY), "FAKETIME": f"{hours:+d}h", "DONT_FAKE_MONOTONIC": "1"}


def start_upload(env: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", UPLOAD, *arguments]
    return subprocess.Popen(command, env=os.environ | env, stdin=pipe, stdout=pipe, text=True)


def test_the_clock_is_really_off(off_by: Callable[[int], dict[str, str]]) -> None:
    """Otherwise the tests below would prove nothing."""
    for hours in (-30, 30):
        code = "import time; print(time.time())"
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | off_by(hours), capture_output=True)
        told = datetime.fromtimestamp(float(done.stdout), UTC)
        assert abs(told - datetime.now(UTC) - timedelta(hours=hours)) < timedelta(minutes=5)


@pytest.mark.parametrize("hours", [-30, 30])
async def test_an_upload_under_way_and_one_just_made_stay(
    store: Store, db: Db, off_by: Callable[[int], dict[str, str]], tmp_path: Path, mongo_uri: str, hours: int
) -> None:
    """The janitor of another worker comes in the middle of an upload, and between it and the document that names it."""
    (tmp_path / "file").write_bytes(os.urandom(1_000_000) + bytes(54_000_000))
    upload = start_upload(off_by(hours), mongo_uri, db.name, str(tmp_path / "file"))
    assert upload.stdout is not None
    assert upload.stdin is not None
    try:
        assert upload.stdout.readline() == "under way\n"
        assert db["models.chunks"].count_documents({}) > 0
        assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 0
        upload.stdin.write("\n")
        upload.stdin.flush()
        file_id = ObjectId(upload.stdout.readline().strip())
        assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 0
    finally:
        upload.stdin.close()
        upload.stdout.close()
        assert upload.wait(30) == 0
    await store.files.models.fetch(file_id, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


async def test_workers_hours_apart_run_tasks_beside_each_other(
    store: Store,
    db: Db,
    serve: Serve,
    image_ids: list[ObjectId],
    dltask_env: dict[str, str],
    off_by: Callable[[int], dict[str, str]],
) -> None:
    """One worker 30 h behind, one 30 h ahead: every task runs once, leases and times are the server's, a training goes
    on from the other's snapshot, and the janitor's passes in between take nothing.
    """
    workers = []
    for hours in (-30, 30):
        dltask_env |= off_by(hours)  # `serve` starts with it
        workers.append(serve(cpu_devices=2, child_command=CHILD))
    before = db.command("hello")["localTime"].replace(tzinfo=UTC)
    db.DL_TASK.insert_many([train_request(task_id, iterations=300) for task_id in range(4)])
    at_work = {"status": "RUNNING", "progress.iteration": {"$gt": 0}}
    tasks = wait_for(lambda: found if len(found := list(db.DL_TASK.find(at_work))) == 4 else None)
    now = db.command("hello")["localTime"].replace(tzinfo=UTC)
    assert all(before <= task["lease_renewed_at"] <= now for task in tasks)
    assert len({task["owner"] for task in tasks}) == 2
    assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 0
    for task_id in range(4):
        task = ended(db, task_id)
        assert (task["status"], task["attempt"], task["failures"]) == ("SUCCEEDED", 1, 0)
        assert before <= task["create_time"] <= task["start_time"] <= task["end_time"]
        assert task["end_time"] - before < timedelta(minutes=5)
        assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 0

    # A training passes from the one that is behind to the one that is ahead.
    workers[1].stop()
    db.DL_TASK.insert_one(train_request(10, iterations=120))
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 10, "snapshot.iteration": {"$gte": 50}}))
    workers[0].stop()
    assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 0
    serve(child_command=CHILD)  # the environment is still that of the last one: 30 h ahead
    task = ended(db, 10, seconds=60)
    assert (task["status"], task["attempt"], task["failures"]) == ("SUCCEEDED", 2, 0)
    assert task["result"]["resumed_from_iteration"] >= 50
    assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 0

    # What the tasks left is there, and read by a worker that is ahead.
    params = {"model_name": "ok", "device_type": "CPU"}
    db.DL_TASK.insert_one(
        {"task_id": 20, "task_type": "TEST", "dataset": "toy", "split": "train", "param_request": params}
    )
    assert ended(db, 20)["status"] == "SUCCEEDED"
    assert await store.files.messages.exists(ObjectId(task["json_mongodb_id"]))
