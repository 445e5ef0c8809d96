"""The Kubernetes manifests as a cluster gets them: rendered by `kubectl kustomize`, which needs no cluster."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1] / "k8s"
OVERLAYS = sorted(path.name for path in (ROOT / "overlays").iterdir())
#: Everything that an operator applies.
APPLIED = ["base", *(f"overlays/{name}" for name in OVERLAYS)]

Object = dict[str, Any]


def kustomize(folder: Path) -> list[Object]:
    """The objects that the kustomization in `folder` renders."""
    # The one that pip installed into this environment, not whatever is on PATH.
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run(
        [kubectl, "kustomize", folder], capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]}
    )
    assert done.returncode == 0, done.stderr
    # Kustomize warns of what a later version will refuse.
    assert done.stderr == ""
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@cache
def rendered(name: str) -> list[Object]:
    """The objects of `base` or `overlays/NAME`."""
    return kustomize(ROOT / name)


def only(objects: list[Object], kind: str, name: str | None = None) -> Object:
    """The one object of that kind, and of that name if one is given."""
    (found,) = (one for one in objects if one["kind"] == kind and name in (None, one["metadata"]["name"]))
    return found


def pod_templates(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """(object, pod template) for each object that makes pods, however deep it keeps the template."""
    for one in objects:
        match one["kind"]:
            case "Deployment" | "StatefulSet" | "Job":
                yield one, one["spec"]["template"]
            case "ScaledJob":
                yield one, one["spec"]["jobTargetRef"]["template"]
            case "JobSet":
                for job in one["spec"]["replicatedJobs"]:
                    yield one, job["template"]["spec"]["template"]


def workers(objects: list[Object]) -> list[tuple[Object, Object]]:
    """(object, pod template) for those of them that run `dltask serve`."""
    found = list(pod_templates(objects))
    return [
        (one, template) for one, template in found if template["spec"]["containers"][0].get("args", [""])[0] == "serve"
    ]


def settings_of(objects: list[Object], template: Object) -> dict[str, str]:
    """The settings that a worker's pod gets in plain text: its ConfigMap's, and over them its own."""
    (container,) = template["spec"]["containers"]
    named = [source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source]
    settings: dict[str, str] = {}
    for name in named:
        settings |= only(objects, "ConfigMap", name)["data"]
    return settings | {entry["name"]: entry["value"] for entry in container.get("env", ())}
