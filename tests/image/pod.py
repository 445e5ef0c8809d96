"""The pod of the `dev` overlay, as it is rendered, run by `podman kube play`."""

import base64
import json
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from tests.image.build import IMAGE
from tests.image.checks import Found, check
from tests.image.containers import Bench, Container, wait_for
from tests.manifests import only, rendered


def pod_file(bench: Bench, folder: Path, port: int) -> Path:
    """The overlay's Deployment with its ConfigMap and Secret, as a file for podman.

    Changed is what the cluster would give: the address of MongoDB, whose own pod needs an image from a registry; the
    database and the port, since the pod shares this machine's network; and the place of the image.
    """
    objects = deepcopy(rendered("overlays/dev"))
    deployment = only(objects, "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    container["image"] = IMAGE
    # podman wants to map the ports, which a host's network has not; and it does not know them by name.
    del container["ports"]
    for probe in ("startup", "readiness", "liveness"):
        container[f"{probe}Probe"]["httpGet"]["port"] = port
    (named,) = (source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source)
    settings, secret = only(objects, "ConfigMap", named), only(objects, "Secret")
    settings["data"] |= {"DLTASK_DATABASE": bench.database, "DLTASK_HTTP_PORT": str(port)}
    secret["data"]["DLTASK_MONGODB_URI"] = base64.b64encode(bench.uri.encode()).decode()
    # podman 4.3 stores a Secret of the file in a form in which its own `envFrom` cannot read it.
    data = folder / "secret.json"
    data.write_text(json.dumps(secret["data"]))
    bench.engine.attempt("podman", "secret", "rm", secret["metadata"]["name"])
    bench.engine.podman("secret", "create", secret["metadata"]["name"], data)
    path = folder / "pod.yaml"
    path.write_text(yaml.safe_dump_all([settings, deployment]))
    return path


def played(bench: Bench, folder: Path, port: int) -> Found:
    """It gets ready, runs a test of the trained model, is held as tight as the manifest says, and drains."""
    path = pod_file(bench, folder, port)
    began = time.monotonic()
    bench.engine.podman("kube", "play", "--network=host", path)
    (name,) = (
        name for name in bench.engine.podman("ps", "--all", "--format={{.Names}}").split() if name.endswith("-dltask")
    )
    pod = Container(bench.engine, name, began)
    seconds = pod.ready()
    status: dict[str, Any] = dict(line.split(":", 1) for line in pod.execute("cat", "/proc/1/status").splitlines())
    check(status["Uid"].split() == ["10001"] * 4, f"the pod runs as {status['Uid']}")
    check(int(status["CapEff"], 16) == 0, f"the pod has capabilities: {status['CapEff']}")
    check(pod.fails("touch", "/opt/dltask/x"), "the pod can write its root")
    task_id = bench.submit("test")
    bench.succeeded(task_id)
    bench.engine.podman("kill", "--signal=TERM", name)
    # A Deployment's pod is started anew: what counts is that the first has taken its leave.
    wait_for("the end of the pod's service", lambda: "service stopped" in pod.log(), 120)
    bench.engine.podman("kube", "down", path)
    return {"pod_ready_seconds": round(seconds, 1), "pod": "held as its manifest says, ran a test, drained"}
