"""`dltask demo` does what it promises on a bare machine, and leaves nothing running, also when it is interrupted."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest

COMMAND = [sys.executable, "-P", "-m", "service.cli", "demo"]


def left_running(mark: str) -> list[str]:
    """The command lines of processes that carry `mark` in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # gone by now, or somebody else's
    return found


@pytest.fixture
def start(tmp_path: Path) -> Callable[[], tuple[subprocess.Popen[str], str]]:
    """Starts the demo in an empty folder, without settings; returns it and a mark that all its processes carry."""

    def start() -> tuple[subprocess.Popen[str], str]:
        mark = uuid.uuid4().hex
        env = {key: value for key, value in os.environ.items() if not key.startswith("DLTASK_")}
        return (
            subprocess.Popen(
                COMMAND,
                cwd=tmp_path,
                env=env | {"DEMO_TEST_MARK": mark, "PYTHONUNBUFFERED": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ),
            mark,
        )

    return start


@pytest.mark.timeout(1200)
def test_from_nothing_to_pictures(start: Callable[[], tuple[subprocess.Popen[str], str]], tmp_path: Path) -> None:
    """Exit 0, a last line of JSON with both states, a test mAP@.5 of at least 0.80, and pictures that are pictures."""
    process, mark = start()
    out, err = process.communicate(timeout=1100)
    log = tmp_path / "demo-output" / "service.log"
    assert process.returncode == 0, out + err + (log.read_text()[-5000:] if log.exists() else "")
    last = json.loads(out.splitlines()[-1])
    assert list(last) == ["train", "test", "map_50", "pictures"]
    assert (last["train"], last["test"]) == ("SUCCEEDED", "SUCCEEDED")
    assert last["map_50"] >= 0.80
    assert last["pictures"]
    for picture in last["pictures"]:
        assert Path(picture).is_relative_to(tmp_path / "demo-output" / "pictures")
        assert cv2.imread(picture) is not None
        assert picture in out.rsplit("\n", 2)[0]
    assert "mAP@.5" in out
    assert not left_running(mark)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_behind(
    start: Callable[[], tuple[subprocess.Popen[str], str]], number: signal.Signals
) -> None:
    """Ctrl-C in the middle ends service, child and database, and the exit code says so."""
    process, mark = start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("TRAIN RUNNING"):
            break
    assert any("mongod" in command for command in left_running(mark))
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert not left_running(mark)
