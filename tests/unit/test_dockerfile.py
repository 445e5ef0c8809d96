"""What can be said of the Dockerfile without building it; `make image-test` builds and runs it."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from service.settings import Settings
from tests.manifests import only, rendered

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest) of the Dockerfile, continued lines joined."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines) if word]


def test_what_is_copied_is_sent_to_the_build(instructions: list[tuple[str, str]]) -> None:
    """.dockerignore keeps everything else out; a folder that it forgot would be missing in the image only."""
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        name
        for word, rest in instructions
        if word == "COPY" and not rest.startswith("--from")
        for name in rest.split()[:-1]
    }
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    # Every package of the project is among them.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {package.removesuffix("*") for package in packages} <= copied


def test_the_health_check_is_plain_words_and_runs_a_program_of_ours(instructions: list[tuple[str, str]]) -> None:
    """podman 4.3 reads no quotes there."""
    (check,) = (rest for word, rest in instructions if word == "HEALTHCHECK")
    assert not set(check) & set("\"'[]|&;$")
    command = check.partition("CMD ")[2].split()
    assert command[:2] == ["python", "-m"]
    assert importlib.util.find_spec(command[2]) is not None


def test_it_runs_as_the_user_of_the_manifest(instructions: list[tuple[str, str]]) -> None:
    """The volumes belong to the pod's group; the image's own user must be in it."""
    security = only(rendered("base"), "Deployment")["spec"]["template"]["spec"]["securityContext"]
    assert ("USER", f"{security['runAsUser']}:{security['runAsGroup']}") in instructions
    assert security["fsGroup"] == security["runAsGroup"]


def test_it_names_settings_that_exist_and_the_port(instructions: list[tuple[str, str]]) -> None:
    """A misspelled setting would be ignored silently."""
    named = set(re.findall(r"\bDLTASK_\w+(?==)", " ".join(rest for word, rest in instructions if word == "ENV")))
    assert named
    assert named <= {f"DLTASK_{field.upper()}" for field in Settings.model_fields}
    assert ("EXPOSE", str(Settings.model_fields["http_port"].default)) in instructions


def test_its_version_is_the_projects(instructions: list[tuple[str, str]]) -> None:
    """The label of an image that was built without arguments."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert ("ARG", f"VERSION={project['project']['version']}") in instructions
