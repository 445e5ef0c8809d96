"""buildah and podman on a storage of their own, so that nothing of a run touches what else is on the machine."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import IO

#: Debian's packages of what is needed.
PACKAGES = ("buildah", "podman", "runc", "catatonit", "debootstrap")

# Limits that a machine allows which is itself a container; no systemd and no journal needed.
_CONFIGURATION = """\
[containers]
default_ulimits=["nofile=20000:20000","nproc=4096:4096"]
pids_limit=0
[engine]
runtime="runc"
cgroup_manager="cgroupfs"
events_logger="file"
"""


class Failed(Exception):
    """A command or a check failed; the message is for a person."""


def install_missing() -> None:
    """Install what is missing, by apt-get."""
    if os.geteuid() != 0:
        raise Failed("building and running images in a storage of one's own needs root: sudo make image-test")
    missing = [package for package in PACKAGES if shutil.which(package) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise Failed(f"please install {' '.join(missing)}")
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["-y", "install", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", "-qq", *command], env=env, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Failed(f"apt-get {' '.join(command)}: {done.stderr.strip()[-500:]}")


class Engine:
    """The two programs. Everything they keep is under `folder`, and gone with `clean`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        configuration = folder / "containers.conf"
        configuration.write_text(_CONFIGURATION)
        self._env = os.environ | {"CONTAINERS_CONF": str(configuration)}
        #: Layers that share their files; `vfs`, which copies them, where the kernel or the disk cannot do that.
        self.driver = "overlay" if self._can_overlay() else "vfs"

    def _can_overlay(self) -> bool:
        lower, upper, work, merged = (self._folder / "try" / name for name in ("lower", "upper", "work", "merged"))
        for part in (lower, upper, work, merged):
            part.mkdir(parents=True, exist_ok=True)
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        mounted = subprocess.run(
            ["mount", "-t", "overlay", "-o", options, "overlay", merged], capture_output=True, check=False
        )
        if mounted.returncode == 0:
            subprocess.run(["umount", merged], check=True)
        shutil.rmtree(self._folder / "try")
        return mounted.returncode == 0

    def command(self, program: str, *arguments: str | Path) -> list[str]:
        """The whole command line of `podman` or `buildah`."""
        where = ["--root", self._folder / "storage", "--runroot", self._folder / "run"]
        return [program, *map(str, where), "--storage-driver", self.driver, *map(str, arguments)]

    def attempt(
        self, program: str, *arguments: str | Path, out: IO[str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end, whatever that is. `out` takes all that it says."""
        to = out or subprocess.PIPE
        command = self.command(program, *arguments)
        return subprocess.run(command, env=self._env, stdout=to, stderr=to, text=True, check=False)

    def run(self, program: str, *arguments: str | Path, out: IO[str] | None = None) -> str:
        """The same; returns stdout without the last end of line. Raises Failed for any exit code but 0."""
        done = self.attempt(program, *arguments, out=out)
        if done.returncode != 0:
            said = "" if out else f"{done.stdout}{done.stderr}".strip()[-3000:]
            raise Failed(f"{program} {' '.join(map(str, arguments))[:200]}: exit code {done.returncode}\n{said}")
        return (done.stdout or "").rstrip("\n")

    def podman(self, *arguments: str | Path) -> str:
        """`podman …`; returns stdout. Raises Failed."""
        return self.run("podman", *arguments)

    def clean(self, *, keep_images: bool) -> None:
        """Remove every pod and container, and every image too unless they are to be kept."""
        self.attempt("podman", "pod", "rm", "--all", "--force", "--time", "5")
        self.attempt("podman", "rm", "--all", "--force", "--time", "5")
        self.attempt("podman", "volume", "rm", "--all", "--force")
        if keep_images:
            return
        self.attempt("podman", "rmi", "--all", "--force")
        # podman mounts the folder of an overlay storage onto itself.
        subprocess.run(["umount", self._folder / "storage" / "overlay"], capture_output=True, check=False)
        shutil.rmtree(self._folder)
