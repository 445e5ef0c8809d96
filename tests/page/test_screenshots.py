"""The pictures of docs/page.md, taken when DLTASK_SCREENSHOTS names a folder: of real trainings on real cells."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect
from pymongo.database import Database

from tests.helpers import Service, ended, wait_for
from tests.page.conftest import Looker, address

Db = Database[dict[str, Any]]

FOLDER = os.environ.get("DLTASK_SCREENSHOTS")
REAL_CHILD = f"{sys.executable} -m handlers.detection"
MOST_BYTES = 300_000
#: Whether every picture of a task's report is there; the page loads those far down only when asked to.
SEEN = """() => [...document.querySelectorAll(".pictures img")].every(image => {
    image.loading = "eager";
    return image.complete && image.naturalWidth > 0;
})"""


def train(number: int, iterations: int, **params: Any) -> dict[str, Any]:
    """A training on the blood cells, as a client asks for it."""
    request = {
        "model_name": "cells",
        "dataset_expansion_lst": ["HOR_FLIPE", "VER_FLIPE"],
        "device_type": "CPU",
        "max_num_iters": iterations,
        "batch_size": 10,
        "snap_shot_ivterval": 50,
        **params,
    }
    return {"task_id": number, "task_type": "TRAIN", "dataset": "bccd", "split": "train", "param_request": request}


def take(page: Page, name: str, *, whole: bool = True) -> None:
    """A picture of the page, of few colours, so that it is small."""
    assert FOLDER is not None
    path = Path(FOLDER) / f"{name}.png"
    page.screenshot(path=path, full_page=whole, animations="disabled")
    with Image.open(path) as picture:
        small = picture.convert("RGB")
    for colours in (256, 128, 64, 32):
        small.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size < MOST_BYTES:
            return
    pytest.fail(f"{path} has {path.stat().st_size} bytes")


def take_all(site: str, look: Callable[..., Looker], *, ended_task: int, running_task: int) -> None:
    """A picture of every page of a site that has a training that ended, and one that runs."""
    for scheme in ("light", "dark"):
        page = look(scheme=scheme).page
        page.goto(site)
        expect(page.locator("#live")).to_have_text("Live")
        expect(page.locator("progress").first).to_be_visible()
        take(page, f"queue-{scheme}")
        page.goto(f"{site}/tasks/{ended_task}")
        expect(page.locator("#live")).to_have_text("Live")
        # Not one by one: a page that comes to life may put others in their place meanwhile.
        page.wait_for_function(SEEN)
        # The curves and classes large enough to be read; then all of it.
        take(page, f"task-{scheme}", whole=False)
        if scheme == "light":
            take(page, "task-whole")
    page = look().page
    page.goto(f"{site}/tasks/{running_task}")
    expect(page.locator("progress").first).to_be_visible()
    take(page, "task-running", whole=False)
    for path, name in (("/models", "models"), ("/models/cells", "model"), ("/workers", "workers")):
        page.goto(site + path)
        take(page, name)
    phone = look(width=360, height=740).page
    for path, name in (("/", "phone-queue"), (f"/tasks/{ended_task}", "phone-task")):
        phone.goto(site + path)
        expect(phone.locator("#live")).to_have_text("Live")
        take(phone, name, whole=False)


@pytest.mark.skipif(FOLDER is None, reason="only where DLTASK_SCREENSHOTS names a folder")
@pytest.mark.timeout(2400)
def test_pictures_of_every_page(
    db: Db,
    serve: Callable[..., Service],
    dltask_env: dict[str, str],
    shared_datasets: Path,
    look: Callable[..., Looker],
) -> None:
    """Two versions of a model, a test, what failed and what waits, and a training that runs while it is looked at."""
    command = [sys.executable, "-m", "service.cli", "dataset", "import", "--format", "coco"]
    subprocess.run([*command, str(shared_datasets / "bccd"), "--name", "bccd"], env=dltask_env, check=True)
    site = address(serve(http_port=0, child_command=REAL_CHILD))
    for number, iterations in ((101, 100), (102, 240)):
        db.DL_TASK.insert_one(train(number, iterations))
        assert ended(db, number, seconds=1500)["status"] == "SUCCEEDED"
    test = {"model_name": "cells", "device_type": "CPU"}
    db.DL_TASK.insert_one(
        {"task_id": 103, "task_type": "TEST", "dataset": "bccd", "split": "test", "param_request": test}
    )
    assert ended(db, 103, seconds=600)["status"] == "SUCCEEDED"
    db.DL_TASK.insert_one(train(104, 50, model_name="<script>alert(1)</script>"))
    db.DL_TASK.insert_one(train(105, 50, batch_size=0))
    db.DL_TASK.insert_one({**train(106, 50), "dataset": "none such"})
    db.DL_TASK.insert_one(train(107, 600, model_name="cells large", model_scope="LARGE"))
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 107, "progress.iteration": {"$gte": 20}}), seconds=600)
    db.DL_TASK.insert_one(train(108, 300, device_type="GPU", device_num=4))
    db.DL_TASK.insert_one(train(109, 300))
    db.DL_TASK.insert_one({**train(110, 300), "priority": 5})
    db.DL_TASK.insert_one({**train(111, 300), "cancel_requested": True})
    ended(db, 111)

    take_all(site, look, ended_task=102, running_task=107)
    db.DL_TASK.update_many({"task_id": {"$gte": 107}}, {"$set": {"cancel_requested": True}})
    assert ended(db, 107)["status"] == "CANCELLED"
