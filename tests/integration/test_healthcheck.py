"""The image's HEALTHCHECK: asks the service of its own settings, and says by its exit code whether it is alive."""

import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.helpers import Service


@pytest.fixture
def port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free: int = probe.getsockname()[1]
    return free


def check(env: dict[str, str], **settings: object) -> subprocess.CompletedProcess[str]:
    env = env | {f"DLTASK_{name.upper()}": str(value) for name, value in settings.items()}
    # As in a container of a cluster that has a proxy for the world outside.
    env |= {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "service.healthcheck"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_living_service_is_healthy_until_it_is_gone(
    dltask_env: dict[str, str], serve: Callable[..., Service], port: int, host: str
) -> None:
    """Wherever it listens; and once it is gone it is not."""
    service = serve(http_port=port, http_host=host)
    asked = check(dltask_env, http_port=port, http_host=host)
    assert (asked.returncode, asked.stdout) == (0, "ok\n"), asked.stderr
    service.stop()
    asked = check(dltask_env, http_port=port, http_host=host)
    assert asked.returncode == 1
    assert f":{port}/livez" in asked.stderr


def test_a_service_that_serves_nothing_is_not_asked(dltask_env: dict[str, str]) -> None:
    """Else a container with DLTASK_HTTP_PORT=off would be ill for ever."""
    assert check(dltask_env, http_port="off").returncode == 0
