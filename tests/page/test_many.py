"""Ten thousand tasks page well: each can be reached, and no page costs more than its own rows."""

import re
import urllib.request
from collections.abc import Callable
from typing import Any

from playwright.sync_api import expect
from pymongo.database import Database

from tests.page.conftest import Looker
from tests.page.documents import ended, result

Db = Database[dict[str, Any]]

TASKS = 10_000
_STATES = ("SUCCEEDED", "FAILED", "CANCELLED", "REJECTED")


def fetched(url: str) -> str:
    with urllib.request.urlopen(url) as answer:
        return str(answer.read().decode())


def test_each_of_ten_thousand_tasks_is_on_a_page(db: Db, site: str, look: Callable[..., Looker]) -> None:
    """From the first page by "Next" to the last; each page is small and fetches its own documents only."""
    whole = result()
    for start in range(0, TASKS, 1000):
        documents = [
            ended(number, _STATES[number % 4], result=whole if number % 4 == 0 else None)
            | {"img_mongodb_ids": ["5f43a1b2c3d4e5f6a7b8c9d0"] * 50, "error_code": 7 if number % 4 == 3 else 0}
            for number in range(start, start + 1000)
        ]
        db.DL_TASK.insert_many(documents)
    # Its own size is a megabyte, of which the first reads fall off.
    db.create_collection("system.profile", capped=True, size=64_000_000)
    db.command("profile", 2)
    found: list[int] = []
    path: str | None = "/"
    pages = 0
    while path:
        html = fetched(site + path)
        assert len(html) < 150_000
        pages += 1
        found += [int(number) for number in re.findall(r'href="/tasks/(\d+)"', html)]
        following = re.search(r'rel="next" href="([^"]+)"', html)
        path = f"/{following[1].replace('&amp;', '&')}" if following else None
    db.command("profile", 0)
    assert pages == TASKS // 50
    assert found == list(range(TASKS - 1, -1, -1))
    reads = list(db["system.profile"].find({"ns": f"{db.name}.DL_TASK", "command.pipeline": {"$exists": True}}))
    assert len(reads) >= pages
    assert max(read.get("docsExamined", 0) for read in reads) <= 51
    assert max(read["responseLength"] for read in reads) < 100_000

    page = look().page
    page.goto(f"{site}/?state=REJECTED")
    expect(page.locator("h2#list")).to_contain_text("1 to 50 of 2,500")
    expect(page.locator(".filter [aria-current=page]")).to_contain_text("Rejected")
    page.get_by_role("link", name="Next").click()
    expect(page.locator("h2#list")).to_contain_text("51 to 100 of 2,500")
    expect(page.locator(".tasks tbody tr")).to_have_count(50)
    page.goto(f"{site}/?page=200")
    expect(page.locator(".tasks tbody tr")).to_have_count(50)
    expect(page.get_by_role("link", name="Next")).to_have_count(0)
    page.goto(f"{site}/?page=201")
    expect(page.locator(".empty")).to_contain_text("There is no page 201")
