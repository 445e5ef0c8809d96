"""Everybody can use the page: by keyboard, on a phone, in light and dark, and read out."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from bson import ObjectId
from playwright.sync_api import Page, expect
from pymongo.database import Database

from tests.helpers import running, train_request
from tests.page.conftest import Looker
from tests.page.documents import CLASSES, ended, result

Db = Database[dict[str, Any]]

PATHS = (
    "/",
    "/?state=FAILED",
    "/tasks/1",
    "/tasks/2",
    "/tasks/9",
    "/models",
    "/models/ok?a=1&b=2",
    "/workers",
    "/tasks/404",
)

#: The contrast of each text with what is behind it, by WCAG 2.2: those below 4.5, or 3 where the text is large.
_CONTRAST = """() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return {r, g, b, a};
  };
  const over = (top, below) => ({
    r: top.r * top.a + below.r * (1 - top.a), g: top.g * top.a + below.g * (1 - top.a),
    b: top.b * top.a + below.b * (1 - top.a), a: 1,
  });
  const light = ({r, g, b}) => {
    const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), {r: 255, g: 255, b: 255, a: 1});
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || !element.checkVisibility() || element.closest(".hidden, progress")) continue;
    const style = getComputedStyle(element);
    const ground = behind(element);
    const ink = over(parse(element.closest("svg") ? style.fill : style.color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const least = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    if ((a + 0.05) / (b + 0.05) < least) poor.push([text, (a + 0.05) / (b + 0.05)]);
  }
  return poor;
}"""


@pytest.fixture
def filled(db: Db, site: str, image_ids: list[ObjectId]) -> str:
    """A site with a bit of everything; task 9 runs."""
    per_class = [{"class_name": name, "map": 0.5, "map_50": 0.8, "instances": 3} for name in CLASSES]
    for version in (1, 2):
        metrics = {"map": 0.5 + version / 10, "map_50": 0.8, "on": "val", "per_class": per_class[: 4 - version]}
        db.DL_MODEL.insert_one({"model_name": "ok", "version": version, "task_id": 100 + version, "metrics": metrics})
    db.DL_TASK.insert_one(ended(1, result=result(reports={"samples.png": str(ObjectId())})))
    db.DL_TASK.insert_one(ended(2, "FAILED", error={"kind": "data", "message": "no image is left", "field": "dataset"}))
    db.DL_TASK.insert_one(ended(3, "REJECTED") | {"error_code": 7})
    db.DL_TASK.insert_one(ended(4, "CANCELLED"))
    db.DL_TASK_METRIC.insert_many(
        [{"_id": {"task": 1, "iteration": at}, "loss": 3 / at, "map": at / 400} for at in range(1, 300, 10)]
    )
    db.DL_TASK_LOG.insert_one(
        {"_id": 1, "lines": ['{"event": "e", "level": "warning", "timestamp": "2026-01-02T03:04:05Z"}']}
    )
    db.DL_TASK.insert_one(train_request(9, iterations=100_000))
    running(db, 9)
    db.DL_TASK.insert_one(train_request(10, iterations=100_000))
    return site


def visit(looker: Looker, url: str) -> Page:
    """The page, whose picture or task may be missing on purpose."""
    looker.page.goto(url)
    looker.trouble[:] = [trouble for trouble in looker.trouble if "404" not in trouble]
    return looker.page


def test_by_keyboard_alone(filled: str, look: Callable[..., Looker]) -> None:
    """The skip link, the tabs, a task, each with a focus that can be seen; boxes that scroll can be reached."""
    looker = look()
    page = visit(looker, filled)
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to the content")
    expect(skip).to_be_focused()
    assert skip.evaluate("link => link.getBoundingClientRect().left >= 0")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="All")).to_be_focused()
    for _ in range(30):
        page.keyboard.press("Tab")
        style = page.evaluate(
            "(() => { const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth] })()"
        )
        assert style == ["solid", "3px"]
        if page.evaluate("document.activeElement.textContent") == "1":
            break
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_contain_text("Task 1")
    looker.trouble[:] = [trouble for trouble in looker.trouble if "404" not in trouble]
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert {"Confusion matrix", "Average precision by class", "Log lines"} <= reached
    page = visit(looker, f"{filled}/models/ok")
    page.get_by_label("Version", exact=True).focus()
    page.keyboard.press("ArrowUp")
    page.get_by_role("button", name="Compare").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/models/ok?a=2&b=2")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(filled: str, look: Callable[..., Looker], scheme: str) -> None:
    """Each text has the contrast of WCAG AA, and the ground is what the reader asked for."""
    looker = look(scheme=scheme)
    for path in PATHS:
        page = visit(looker, filled + path)
        assert page.evaluate(_CONTRAST) == []
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (sum(ground) > 600) if scheme == "light" else (sum(ground) < 120)


@pytest.mark.parametrize("width", [320, 360, 768])
def test_on_a_phone_nothing_lies_beside_the_screen(filled: str, look: Callable[..., Looker], width: int) -> None:
    """The page itself never scrolls sideways; tables that are wider do, inside their frame."""
    looker = look(width=width, height=740)
    for path in PATHS:
        page = visit(looker, filled + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        wide = page.evaluate(
            """() => [...document.querySelectorAll("main *")]
                .filter((e) => !e.closest(".scroll, .hidden, thead, svg"))
                .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
                .map((e) => e.outerHTML.slice(0, 200))"""
        )
        assert wide == [], path


def test_a_screen_reader_finds_its_way(filled: str, look: Callable[..., Looker]) -> None:
    """Landmarks, one heading of the first level, headers with a scope, names for all that is drawn, no chatter."""
    looker = look()
    for path in PATHS:
        page = visit(looker, filled + path)
        assert page.evaluate("document.documentElement.lang") == "en"
        assert page.title().endswith("· dltask")
        for landmark in ("banner", "main", "contentinfo"):
            expect(page.get_by_role(landmark)).to_have_count(1)
        expect(page.locator("h1")).to_have_count(1)
        levels = [
            int(name[1]) for name in page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => h.tagName)")
        ]
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        count = "selector => document.querySelectorAll(selector).length"
        assert page.evaluate(count, "th:not([scope])") == 0
        assert page.evaluate(count, "table:not(:has(caption))") == 0
        assert page.evaluate(count, "img:not([alt]), svg:not([aria-hidden]):not([role=img][aria-label])") == 0
        assert page.evaluate(count, "progress:not([aria-label])") == 0
        assert page.evaluate(count, "nav:not([aria-label]), [role=region]:not([aria-label])") == 0
        assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == page.evaluate(
            count, "[id]"
        )
        # What moves all the time is in no region that is read out.
        assert page.evaluate(count, "[role=status] progress, [aria-live] progress, [role=alert] progress") == 0
    page = visit(looker, filled)
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="9", exact=True)).first
    expect(row.get_by_role("progressbar", name="Progress of task 9")).to_be_visible()
    expect(row.get_by_role("rowheader")).to_contain_text("9")
    # On a phone the lines are drawn as blocks, and are still a table to whoever hears them.
    narrow = look(width=360)
    page = visit(narrow, filled)
    expect(page.get_by_role("row").first).to_be_attached()
    assert page.get_by_role("cell").count() > 10


def test_without_scripts_everything_is_there(filled: str, browser: Any) -> None:
    """Only what moves needs a script: lists, pages, comparisons and pictures do not."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{filled}/tasks/1")
    expect(page.locator(".scores")).to_contain_text("0.510")
    page.goto(f"{filled}/models/ok")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("h2#compare")).to_be_visible()
    context.close()
