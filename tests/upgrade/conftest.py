"""The first release, as it was: unpacked from its own source, and run beside this version on one database."""

import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import Service, services
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
    with services(dltask_env, tmp_path, "first", cwd=first_release) as start:
        yield start
