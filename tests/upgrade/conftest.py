"""The first release, as it was: unpacked from its own source, and run beside this version on one database."""

import contextlib
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import STANDIN, Service, wait_for
from tests.integration.conftest import image_ids  # noqa: F401  a fixture

#: `git archive 2e6ea8b schemas handlers service pyproject.toml`
_SOURCE = Path(__file__).parent / "dltask-0.1.0.tar.gz"


@pytest.fixture(scope="session")
def first_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the source of 0.1.0; what is started with it as its working directory is that version."""
    folder = tmp_path_factory.mktemp("dltask-0.1.0")
    with tarfile.open(_SOURCE) as archive:
        archive.extractall(folder, filter="data")
    code = "import service, handlers, schemas; print(service.__file__, handlers.__file__, schemas.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert all(Path(path).is_relative_to(folder) for path in found.stdout.split()), found.stdout
    return folder


@pytest.fixture
def serve_first(first_release: Path, dltask_env: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """As the fixture `serve`, but the services are of version 0.1.0."""
    started: list[Service] = []
    with contextlib.ExitStack() as files:

        def start(**settings: Any) -> Service:
            env = dltask_env | {
                "DLTASK_CHILD_COMMAND": STANDIN,
                "STANDIN_LOG": str(tmp_path / "children.jsonl"),
                "DLTASK_LOG_FORMAT": "json",
                "DLTASK_SWEEP_SECONDS": "1",
                "DLTASK_GRACE_SECONDS": "5",
            }
            env |= {f"DLTASK_{name.upper()}": str(value) for name, value in settings.items()}
            log = tmp_path / f"first-{len(started)}.log"
            out = files.enter_context(log.open("wb"))
            process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", "serve"], env=env, cwd=first_release, stderr=out
            )
            started.append(Service(process, log))
            wait_for(lambda: "service ready" in log.read_text() or process.poll() is not None)
            return started[-1]

        yield start
        for service in started:
            if service.process.poll() is None:
                service.stop()
