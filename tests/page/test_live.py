"""What is looked at moves without a reload, in the list and on the task's own page, and its end is shown."""

from collections.abc import Callable
from typing import Any

from bson import ObjectId
from playwright.sync_api import expect
from pymongo.database import Database

from tests.helpers import Service, ended, running, train_request, wait_for
from tests.page.conftest import Looker, address

Db = Database[dict[str, Any]]


def test_progress_moves_without_a_reload(
    db: Db, site: str, look: Callable[..., Looker], image_ids: list[ObjectId]
) -> None:
    """The bar of a running training grows, in the list and on its page; the documents of both stay the same."""
    db.DL_TASK.insert_one(train_request(1, iterations=100_000))
    running(db, 1)
    for path in ("/", "/tasks/1"):
        page = look().page
        page.goto(site + path)
        page.evaluate("window.loadedOnce = true")
        bar = page.locator("progress").first
        before = float(bar.get_attribute("value") or 0)
        page.wait_for_function(
            "before => document.querySelector('progress').value > before + 20 && window.loadedOnce", arg=before
        )
        expect(page.locator("#live")).to_have_text("Live")
    chart = page.get_by_role("img", name="loss over iteration")
    drawn = chart.get_attribute("aria-label")
    page.wait_for_function("old => !document.querySelector('svg.chart').outerHTML.includes(old)", arg=drawn)
    db.DL_TASK.update_one({"task_id": 1}, {"$set": {"cancel_requested": True}})
    expect(page.locator(".status .chip")).to_have_text("CANCELLED")
    expect(page.get_by_role("status").filter(has_text="Task 1 is CANCELLED.")).to_be_attached()
    assert page.evaluate("window.loadedOnce")


def test_a_task_that_is_watched_from_its_beginning_shows_its_result(
    db: Db, serve: Callable[..., Service], look: Callable[..., Looker], image_ids: list[ObjectId]
) -> None:
    """Waiting, running, succeeded: state, counts, history and result come by themselves."""
    site = address(serve(http_port=0))
    db.DL_TASK.insert_one(train_request(1, iterations=100_000))
    running(db, 1)
    db.DL_TASK.insert_one(train_request(2, iterations=20))
    page = look().page
    page.goto(f"{site}/tasks/2")
    expect(page.locator(".status .chip")).to_have_text("PENDING")
    expect(page.locator(".status")).to_contain_text("position 1 of 1 in the queue")
    lists = look().page
    lists.goto(f"{site}/?state=PENDING")
    expect(lists.locator("[data-live='line:2:state']")).to_have_text("PENDING")
    db.DL_TASK.update_one({"task_id": 1}, {"$set": {"cancel_requested": True}})
    ended(db, 2)
    expect(page.locator(".status .chip")).to_have_text("SUCCEEDED")
    expect(page.locator(".scores")).to_contain_text("0.750")
    expect(page.locator(".history li")).to_have_count(3)
    expect(page.locator(".log")).to_contain_text("task succeeded")
    expect(lists.locator("[data-live='line:2:state']")).to_have_text("SUCCEEDED")
    expect(lists.locator("[data-live='count:SUCCEEDED']")).to_have_text("1")


def test_a_worker_shows_what_it_runs(db: Db, site: str, look: Callable[..., Looker], image_ids: list[ObjectId]) -> None:
    """Its devices, of which none is free, and a link to the task that it runs."""
    db.DL_TASK.insert_one(train_request(7, iterations=100_000))
    running(db, 7)
    wait_for(lambda: db.DL_WORKER.find_one({"running": "7/1"}))
    page = look().page
    page.goto(f"{site}/workers")
    row = page.get_by_role("row").filter(has_text="taking tasks")
    expect(row).to_contain_text("1 CPU")
    expect(row).to_contain_text("0 CPU")
    row.get_by_role("link", name="7 (attempt 1)").click()
    expect(page.locator("h1")).to_contain_text("Task 7")


def test_what_is_being_read_is_not_pulled_away(
    db: Db, site: str, look: Callable[..., Looker], image_ids: list[ObjectId]
) -> None:
    """A part that has the keyboard is left alone while it has it, and comes as soon as it has not."""
    db.DL_TASK.insert_one(train_request(1, iterations=100_000))
    running(db, 1)
    page = look().page
    page.goto(f"{site}/tasks/1")
    log = page.locator(".log")
    log.focus()
    log.evaluate("box => { box.mine = true }")
    before = float(page.locator("progress").first.get_attribute("value") or 0)
    page.wait_for_function("before => document.querySelector('progress').value > before + 300", arg=before)
    assert log.evaluate("box => box.mine")
    page.locator("a.brand").focus()
    page.wait_for_function("() => !document.querySelector('.log').mine")


def test_the_page_ends_with_its_worker_and_does_not_hold_it_up(
    db: Db, serve: Callable[..., Service], look: Callable[..., Looker], image_ids: list[ObjectId]
) -> None:
    """A worker that stops lets its lookers go; the page says that nothing moves any more."""
    service = serve(http_port=0)
    looker = look()
    looker.page.goto(address(service))
    expect(looker.page.locator("#live")).to_have_text("Live")
    assert service.stop() == 0
    assert "timeout" not in service.log.read_text()
    expect(looker.page.locator("#live")).not_to_have_text("Live")
    # Which is what the browser itself says of a connection that is refused.
    assert all("ERR_CONNECTION_REFUSED" in trouble or "ERR_INCOMPLETE" in trouble for trouble in looker.trouble)
    looker.trouble.clear()
