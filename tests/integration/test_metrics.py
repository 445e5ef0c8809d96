"""What a scrape of a running service says, in peace and in each fault that an alert is made for."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pymongo.database import Database

from tests.alerts import firing
from tests.failpoints import away, on_command
from tests.helpers import Service, ended, running, train_request, wait_for
from tests.scrape import Samples, address, scrape

Db = Database[dict[str, Any]]
Serve = Callable[..., Service]


@pytest.fixture(scope="module")
def mongo_uri(start_mongod: Callable[..., str]) -> str:
    """A server that fails on command, instead of the one that all tests share."""
    return start_mongod("--setParameter", "enableTestCommands=1")


def until(url: str, condition: Callable[[Samples], Any], seconds: float = 30) -> Samples:
    """The first scrape that meets the condition: what is counted after a write, or read from time to time."""

    def look() -> Samples | None:
        seen = scrape(url)
        return seen if condition(seen) else None

    found: Samples = wait_for(look, seconds)
    return found


def peaceful(seen: Samples) -> bool:
    """Whether the worker has the database and its change stream."""
    return bool(seen("database_up") and seen("stream_open"))


def test_what_befalls_tasks_is_counted(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """A training, a test, a rejected document: answers, starts, attempts, children, each with its time."""
    url = address(serve(http_port=0))
    calm = until(url, peaceful)
    db.DL_TASK.insert_one(train_request(4711, iterations=250))
    seen = until(url, lambda seen: seen("images_per_second", type="TRAIN"))
    # The stand-in says 1 a second.
    assert (seen("images_per_second"), seen("attempts_running"), seen("devices_free", device="CPU")) == (1, 1, 0)
    ended(db, 4711)
    test = {"task_type": "TEST", "dataset": "toy", "split": "train"}
    db.DL_TASK.insert_one({"task_id": 4712, "param_request": {"model_name": "ok:1", "device_type": "CPU"}, **test})
    ended(db, 4712)
    db.DL_TASK.insert_one(train_request(-1))
    ended(db, -1)
    seen = until(url, lambda seen: seen("admissions_total") == 3 and seen("attempt_seconds_count") == 2)
    assert (seen("admissions_total", code="OK"), seen("admissions_total", code="TASK_ID_INVALID")) == (2, 1)
    for kind in ("TRAIN", "TEST"):
        assert seen("start_seconds_count", type=kind) == 1
        assert seen("attempt_seconds_count", type=kind, outcome="succeeded") == 1
        assert seen("tasks_ended_total", type=kind, state="SUCCEEDED", error="") == 1
    assert seen("attempt_seconds_sum", type="TRAIN") > 250 * 0.02
    assert (seen("images_per_second"), seen("attempts_running"), seen("devices_free", device="CPU")) == (0, 0, 1)
    # One warm child waits.
    assert (seen("child_starts_total"), seen("child_ends_total", reason="finished")) == (3, 2)
    assert seen("lease_renewals_total", result="done") >= 2
    assert (seen("lease_renewals_total", result="failed"), seen("leases_lost_total")) == (0, 0)
    assert seen("stream_events_total", kind="new") == 3
    assert (seen("stream_opens_total"), seen("sweep_failures_total")) == (1, 0)
    assert seen("sweep_seconds_count") > 1
    # A write and the look at it can be on two sides of a full second.
    until(url, lambda seen: seen("stream_lag_seconds") <= 1)
    before = seen("sweep_success_age_seconds")
    until(url, lambda seen: seen("sweep_success_age_seconds") < before)
    assert "process_resident_memory_bytes" in seen.text
    assert seen("build_info") == 1
    told = {value for _, labels in seen.values for _, value in labels}
    assert not told & {"4711", "4712", "ok", "ok:1", "toy", db.name}
    assert firing(calm, seen) == set()


def test_how_long_an_answer_takes(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """Of each document that the change stream told; here no sweep can be first. A clock that is off would show."""
    url = address(serve(http_port=0, sweep_seconds=600))
    until(url, lambda seen: peaceful(seen) and seen("sweep_seconds_count") == 1)
    db.DL_TASK.insert_many([train_request(-number) for number in range(1, 4)])
    seen = until(url, lambda seen: seen("admissions_total", code="TASK_ID_INVALID") == 3)
    assert (seen("admission_seconds_count"), seen("admission_seconds_bucket", le="60.0")) == (3, 3)
    assert seen("admission_seconds_sum") > 0


def test_a_task_that_no_worker_can_take(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """Eight GPUs, where there are none: it is told by what it needs, and no longer once it is cancelled."""
    url = address(serve(http_port=0, gpu_devices=0))
    calm = until(url, peaceful)
    request = train_request(1)
    request["param_request"] |= {"device_type": "GPU", "device_num": 8}
    db.DL_TASK.insert_one(request)
    seen = until(url, lambda seen: seen("queue_unservable", device="GPU", devices="8") == 1)
    assert (seen("tasks", state="PENDING"), seen("queue_waiting", device="GPU"), seen("workers")) == (1, 1, 1)
    # `until` more than one look at the queue has seen it waiting.
    seen = until(url, lambda seen: seen("queue_oldest_seconds", device="GPU", servable="no") > 1)
    assert firing(calm, seen) == {"DltaskNoWorkerForNeed"}
    db.DL_TASK.update_one({}, {"$set": {"cancel_requested": True}})
    seen = until(url, lambda seen: seen("tasks", state="PENDING") == 0)
    assert (seen("queue_unservable"), seen("queue_waiting"), seen("queue_oldest_seconds")) == (0, 0, 0)
    assert seen("tasks_ended_total", type="unknown", state="CANCELLED", error="") == 1


def test_a_task_that_waits_although_a_device_is_free(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """Since it is kept free for one that needs two, and has waited longer: the alert's own exception.

    Of the one that needs two no alert is made: both are not free.
    """
    url = address(serve(http_port=0, cpu_devices=2))
    db.DL_TASK.insert_one(train_request(1, iterations=100_000))
    running(db, 1)
    calm = until(url, lambda seen: peaceful(seen) and seen("devices_free", device="CPU") == 1)
    request = train_request(2)
    request["param_request"]["device_num"] = 2
    db.DL_TASK.insert_one(request)
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 2, "status": "PENDING"}))
    db.DL_TASK.update_one({"task_id": 2}, [{"$set": {"create_time": {"$subtract": ["$$NOW", 3_600_000]}}}])
    seen = until(url, lambda seen: seen("queue_oldest_seconds", device="CPU", servable="yes") > 3600)
    assert (seen("devices", device="CPU"), seen("devices_free", device="CPU")) == (2, 1)
    assert (seen("tasks", state="RUNNING"), seen("tasks", state="PENDING"), seen("queue_unservable")) == (1, 1, 0)
    assert seen("queue_claimable_seconds", device="CPU") == 0
    assert firing(calm, seen) == set()
    db.DL_TASK.insert_one(train_request(3))
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 3, "status": "PENDING"}))
    db.DL_TASK.update_one({"task_id": 3}, [{"$set": {"create_time": {"$subtract": ["$$NOW", 1_800_000]}}}])
    seen = until(url, lambda seen: seen("queue_claimable_seconds", device="CPU") > 1800)
    assert firing(calm, seen) == {"DltaskQueueStuck"}


def test_crashing_children_make_a_storm_of_retries(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """Each crash is counted by what went wrong, when its task goes back to the queue and when it ends there."""
    url = address(serve(http_port=0, cpu_devices=4))
    calm = until(url, peaceful)
    db.DL_TASK.insert_many([train_request(number, model_name="crash", max_attempts=2) for number in range(12)])
    db.DL_TASK.insert_one(train_request(99, model_name="crash", max_attempts=100))
    seen = until(url, lambda seen: seen("tasks_ended_total") == 12 and seen("queue_backing_off") == 1, 60)
    assert seen("tasks_retried_total", type="TRAIN", error="child_died") >= 13
    assert seen("tasks_ended_total", type="TRAIN", state="FAILED", error="child_died") == 12
    assert seen("attempt_seconds_count", outcome="failed") == 12
    assert seen("child_ends_total", reason="signal") >= 25
    assert firing(calm, seen) == {"DltaskRetryStorm"}


def test_a_bug(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """One task that fails by a fault of the service is enough."""
    url = address(serve(http_port=0))
    calm = until(url, peaceful)
    db.DL_TASK.insert_many([train_request(1, model_name="bug"), train_request(2, model_name="data")])
    seen = until(url, lambda seen: seen("tasks_ended_total", type="TRAIN", state="FAILED") == 2)
    assert seen("tasks_ended_total", error="bug") == seen("tasks_ended_total", error="data") == 1
    assert seen("child_ends_total", reason="failed") == 2
    assert firing(calm, seen) == {"DltaskTaskBug"}


def test_a_worker_that_lost_its_tasks(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """Frozen for longer than its lease: who takes the tasks back counts it, and who lost them counts that."""
    settings = {"http_port": 0, "lease_seconds": 2, "child_silence_seconds": 600}
    first = serve(**settings, cpu_devices=3)
    db.DL_TASK.insert_many([train_request(number, iterations=100_000) for number in range(3)])
    for number in range(3):
        running(db, number)
    before = until(address(first), peaceful)
    second = serve(**settings, cpu_devices=0)
    calm = until(address(second), peaceful)
    first.process.send_signal(signal.SIGSTOP)
    try:
        seen = until(address(second), lambda seen: seen("tasks_taken_back_total", status="PENDING") == 3)
    finally:
        first.process.send_signal(signal.SIGCONT)
    assert "DltaskWorkersLost" in firing(calm, seen)
    seen = until(address(first), lambda seen: seen("leases_lost_total") == 3)
    assert seen("attempt_seconds_count", outcome="lost") == 3
    assert "DltaskLeasesLost" in firing(before, seen)
    until(address(first), lambda seen: seen("child_ends_total", reason="killed") == 3)


def test_a_machine_that_fails(db: Db, serve: Serve, image_ids: list[ObjectId], dltask_env: dict[str, str]) -> None:
    """A worker that rests has no device free, however many it has."""
    cache = Path(dltask_env["DLTASK_CACHE_DIR"])
    cache.mkdir()
    (cache / "images").write_text("a file where a folder belongs")
    url = address(serve(http_port=0))
    calm = until(url, peaceful)
    db.DL_TASK.insert_one(train_request(1))
    seen = until(url, lambda seen: seen("worker_resting") and seen("attempts_running") == 0)
    assert (seen("devices", device="CPU"), seen("devices_free", device="CPU")) == (1, 0)
    assert seen("tasks_retried_total", error="machine") == 1
    assert "DltaskWorkerResting" in firing(calm, seen)


def test_a_stream_that_cannot_be_opened(db: Db, serve: Serve) -> None:
    """MongoDB answers, but not to this."""
    url = address(serve(http_port=0))
    calm = until(url, peaceful)
    with on_command(db, "aggregate", namespace=f"{db.name}.$cmd.aggregate", errorCode=13):
        db.client.drop_database(db.name)
        seen = until(url, lambda seen: not seen("stream_open") and seen("stream_ends_total", reason="passing"))
        assert seen("database_up") == 1
        assert "DltaskStreamDown" in firing(calm, seen)
    until(url, peaceful)


def test_a_stream_that_breaks_again_and_again(db: Db, serve: Serve) -> None:
    """Opened each time, and lost at once."""
    url = address(serve(http_port=0))
    calm = until(url, peaceful)
    with on_command(db, "getMore", errorCode=286):  # ChangeStreamHistoryLost
        seen = until(url, lambda seen: seen("stream_opens_total") > 12, 60)
    assert seen("stream_ends_total", reason="history_lost") >= 11
    assert "DltaskStreamReopening" in firing(calm, seen)


def test_the_database_away(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """A scrape is answered all the same, with what is known and its age; errors, sweeps and renewals are told."""
    url = address(serve(http_port=0))
    db.DL_TASK.insert_one(train_request(1, iterations=100_000))
    running(db, 1)
    calm = until(url, lambda seen: peaceful(seen) and seen("tasks", state="RUNNING") == 1)
    with away(db):
        seen = until(url, lambda seen: seen.has("database_up") and not seen("database_up"), 60)
        assert seen("tasks", state="RUNNING") == 1
        assert seen("database_read_age_seconds") > 1
        seen = until(
            url, lambda seen: seen("sweep_failures_total") and seen("lease_renewals_total", result="failed"), 60
        )
        assert seen("mongodb_errors_total", kind="unreachable") > 0
        seen = until(url, lambda seen: seen("sweep_success_age_seconds") > 10, 60)
        seen = until(url, lambda seen: not seen("stream_open"), 60)
        assert math.isnan(seen("stream_lag_seconds"))
        assert firing(calm, seen) == {"DltaskDatabaseAway"}
    seen = until(url, peaceful, 60)
    assert seen("database_read_age_seconds") < 10
    assert seen("stream_opens_total") >= 2
    assert seen("stream_ends_total", reason="unreachable") + seen("stream_ends_total", reason="timeout") >= 1
    assert seen("leases_lost_total") == 0


def test_a_database_that_is_slow(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """A look at the queue is given up after some seconds, on the server too; the work goes on."""
    url = address(serve(http_port=0))
    until(url, peaceful)
    slow = {"namespace": f"{db.name}.DL_TASK", "blockConnection": True, "blockTimeMS": 15_000}
    with on_command(db, "aggregate", **slow):
        seen = until(url, lambda seen: seen.has("database_up") and not seen("database_up"), 60)
        assert seen("mongodb_errors_total", kind="unreachable") + seen("mongodb_errors_total", kind="timeout") > 0
        db.DL_TASK.insert_one(train_request(1))
        assert ended(db, 1)["status"] == "SUCCEEDED"
    until(url, peaceful, 60)


def test_the_change_stream_opened_again(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """A dropped database ends the stream without an error."""
    url = address(serve(http_port=0))
    until(url, lambda seen: seen("stream_open"))
    # Once more, where it met the look at all documents that each opening begins with: that is an error.
    seen = until(url, lambda seen: seen("stream_ends_total", reason="ended") or db.client.drop_database(db.name))
    again = seen("stream_opens_total")
    until(url, lambda seen: seen("stream_open") and seen("stream_opens_total") >= max(again, 2))


def test_a_worker_that_drains(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """It is served to the end, and has no device free; its task is released, which is no fault."""
    service = serve(http_port=0, cpu_devices=2, grace_seconds=60)
    url = address(service)
    db.DL_TASK.insert_one(train_request(1, model_name="deaf", iterations=1000))
    running(db, 1)
    service.process.send_signal(signal.SIGTERM)
    seen = until(url, lambda seen: seen("worker_draining"))
    assert (seen("devices_free"), seen("devices", device="CPU"), seen("attempts_running")) == (0, 2, 1)
    service.kill()


def test_no_http_no_metrics(db: Db, serve: Serve) -> None:
    """Off is off: nothing listens."""
    service = serve(http_port="off")
    assert "http served" not in service.log.read_text()
