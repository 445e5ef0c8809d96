"""A worker looks for garbage in cycles less often than Python does by itself."""

import subprocess
import sys

START = """
import gc
from service import app
from service.settings import Settings

async def serve(*_: object) -> None:
    print(*gc.get_threshold())

app.serve = serve
app.run(Settings(mongodb_uri="mongodb://127.0.0.1:1"))
"""


def test_a_worker_collects_rarely() -> None:
    """From its start; a process of its own, since starting a service changes the process."""
    told = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True).stdout
    assert int(told.split()[0]) >= 10_000
