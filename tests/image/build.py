"""The base image, by debootstrap, and ours on it."""

import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from tests.image.engine import Engine, Failed

ROOT = Path(__file__).resolve().parents[2]
BASE = "localhost/dltask-test-base"
IMAGE = f"localhost/dltask:{version('dltask')}"

#: Settings of pip that say where packages come from.
_SOURCES = ("index-url", "extra-index-url", "find-links", "trusted-host", "default-timeout", "timeout", "retries")


def build_base(engine: Engine, folder: Path) -> None:
    """A bare Debian with the Python that the Dockerfile would install anyway: instead of the CUDA image, which is no
    part of what is tested and comes from a registry."""
    if engine.podman("images", "--quiet", BASE):
        return
    system = folder / "debian"
    shutil.rmtree(system, ignore_errors=True)
    include = "ca-certificates,python3,python3-venv"
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={include}", "bookworm", system],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise Failed(f"debootstrap: exit code {done.returncode}\n{done.stdout[-2000:]}")
    # Each packet that apt fetched, which the base images of registries have not either.
    shutil.rmtree(system / "var/cache/apt/archives", ignore_errors=True)
    archive = folder / "debian.tar"
    subprocess.run(["tar", "-C", system, "-cf", archive, "."], check=True)
    shutil.rmtree(system)
    engine.podman("import", archive, BASE)
    archive.unlink()


def build_image(engine: Engine, folder: Path) -> float:
    """Build the Dockerfile on the base; returns the seconds. What the build says goes to `folder/build.log`."""
    began = time.monotonic()
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    arguments = {"BASE": BASE, "VERSION": version("dltask"), "REVISION": revision or "unknown"}
    with (folder / "build.log").open("w") as log:
        try:
            engine.run(
                "buildah",
                "bud",
                "--isolation=chroot",
                "--pull-never",
                "--format=docker",
                # Where layers are copied each step would cost the whole image once more.
                f"--layers={'true' if engine.driver == 'overlay' else 'false'}",
                *(f"--build-arg={name}={value}" for name, value in arguments.items()),
                *_pip_mounts(folder / "pip"),
                f"--tag={IMAGE}",
                ROOT,
                out=log,
            )
        except Failed as error:
            tail = (folder / "build.log").read_text()[-3000:]
            raise Failed(f"{error}\n{tail}") from None
    return time.monotonic() - began


def _pip_mounts(folder: Path) -> list[str]:
    """What gives pip in the build the package sources of this machine's pip; none of it comes into the image.

    A machine without settings of its own needs nothing of it: then it is PyPI.
    """
    folder.mkdir(exist_ok=True)
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings: dict[str, str] = {}
    for name, value in re.findall(r"^(?:global|install|:env:)\.([a-z-]+)='(.*)'$", listed, re.MULTILINE):
        if name in (*_SOURCES, "cert"):
            settings[name] = value
    local = re.findall(r"(?:file://)?(/[^\s']+)", " ".join(settings.get(n, "") for n in _SOURCES if n != "index-url"))
    # The folder of files that an index links to lies beside it.
    mounts = {Path(path).parent if Path(path).name == "simple" else Path(path) for path in local}
    mounts = {path for path in mounts if path.is_dir()}
    if "cert" in settings:
        # At a place of its own: installing packages renews the one that the system has.
        shutil.copy(settings["cert"], folder / "certificates.crt")
        settings["cert"] = "/run/pip/certificates.crt"
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    return [
        f"--volume={folder}/pip.conf:/etc/pip.conf:ro",
        f"--volume={folder}:/run/pip:ro",
        *(f"--volume={path}:{path}:ro" for path in sorted(mounts)),
    ]
