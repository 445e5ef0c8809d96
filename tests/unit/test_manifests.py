"""The Kubernetes manifests keep the rules that the service relies on, and name settings that exist."""

import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.manifests import APPLIED, OVERLAYS, ROOT, only, pod_templates, rendered, settings_of, workers

Object = dict[str, Any]


def every_pod() -> list[Any]:
    """Every pod of everything that is applied."""
    return [
        pytest.param(template, id=f"{name}:{one['metadata']['name']}")
        for name in APPLIED
        for one, template in pod_templates(rendered(name))
    ]


def every_worker() -> list[Any]:
    """Every pod that runs `dltask serve`, with its settings."""
    return [
        pytest.param(template["spec"], settings_of(rendered(name), template), id=f"{name}:{one['metadata']['name']}")
        for name in APPLIED
        for one, template in workers(rendered(name))
    ]


def test_every_file_in_a_folder_is_applied() -> None:
    """A manifest that its kustomization forgets would never reach a cluster."""
    for kustomization in ROOT.rglob("kustomization.yaml"):
        folder, content = kustomization.parent, yaml.safe_load(kustomization.read_text())
        named = {*content.get("resources", ()), *content.get("configurations", ())}
        for generator in content.get("configMapGenerator", ()):
            named |= set(generator.get("files", ()))
        found = {path.name for path in folder.iterdir() if path.is_file()} - {"kustomization.yaml"}
        folders = {path.name for path in folder.iterdir() if path.is_dir()}
        # A folder of overlays or components lists none: each is applied by itself.
        assert {name for name in named if "/" not in name} == found | folders, folder


@pytest.mark.parametrize("template", every_pod())
def test_it_runs_under_the_restricted_pod_security_standard(template: Object) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, and a read-only root."""
    pod = template["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    assert pod["automountServiceAccountToken"] is False
    assert "initContainers" not in pod  # they would have to be looked at as well
    assert not any("hostPath" in volume for volume in pod["volumes"])


@pytest.mark.parametrize("template", every_pod())
def test_memory_is_limited_and_what_is_written_has_a_limit(template: Object) -> None:
    """Without limits a training would take its neighbours' memory, and a full disk the whole node's pods."""
    for container in template["spec"]["containers"]:
        assert "memory" in container["resources"]["limits"]
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert all("sizeLimit" in volume["emptyDir"] for volume in template["spec"]["volumes"] if "emptyDir" in volume)


@pytest.mark.parametrize("name", APPLIED)
def test_a_selector_finds_its_own_pods(name: str) -> None:
    """A selector that misses its own pods is refused by the server only; one that finds others' counts them too."""
    objects = rendered(name)
    for one, template in pod_templates(objects):
        if one["kind"] not in ("Deployment", "StatefulSet"):
            continue
        wanted = one["spec"]["selector"]["matchLabels"].items()
        found = [other for other, its in pod_templates(objects) if wanted <= its["metadata"]["labels"].items()]
        assert found == [one], (one["metadata"]["name"], template["metadata"]["labels"])


@pytest.mark.parametrize(("pod", "settings"), every_worker())
def test_the_settings_exist_and_are_valid(
    pod: Object, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A misspelled DLTASK_ name would be ignored silently, a bad value would end every pod at its start."""
    assert set(settings) <= {f"DLTASK_{field.upper()}" for field in Settings.model_fields}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DLTASK_MONGODB_URI", "mongodb://example.invalid/")
    read = Settings()
    assert str(read.cache_dir) == settings["DLTASK_CACHE_DIR"]
    # What it writes lies on a volume: the root is read-only.
    (container,) = pod["containers"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {settings["DLTASK_CACHE_DIR"], "/tmp"} <= mounts
    assert read.cache_bytes < 50 * 2**30  # the limit of that volume; beyond it the pod is evicted


@pytest.mark.parametrize(("pod", "settings"), every_worker())
def test_a_pod_has_the_time_to_snapshot_and_to_release_its_task(pod: Object, settings: dict[str, str]) -> None:
    """Kubernetes kills later than the service has promised to be gone, which takes the grace period twice at worst."""
    assert pod["terminationGracePeriodSeconds"] >= 2 * float(settings["DLTASK_GRACE_SECONDS"]) + 10


@pytest.mark.parametrize(("pod", "settings"), every_worker())
def test_the_probes_ask_what_is_served(pod: Object, settings: dict[str, str]) -> None:
    """Liveness never asks for MongoDB, and the kubelet reaches the server from outside the pod."""
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["http"] == int(settings["DLTASK_HTTP_PORT"])
    assert settings["DLTASK_HTTP_HOST"] == "0.0.0.0"
    asked = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: get["path"] for name, get in asked.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    assert {get["port"] for get in asked.values()} == {"http"}


@pytest.mark.parametrize(("pod", "settings"), every_worker())
def test_gpus_are_limited_to_what_the_worker_may_claim(pod: Object, settings: dict[str, str]) -> None:
    """A worker without a GPU counts none, one with several leaves small tasks to others, and NCCL has its memory."""
    (container,) = pod["containers"]
    gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", "0"))
    assert (gpus == 0) == (settings.get("DLTASK_GPU_DEVICES") == "0")
    assert 1 <= int(settings.get("DLTASK_MIN_DEVICE_NUM", "1")) <= max(1, gpus)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_the_classes_of_gpu_workers_leave_no_gap() -> None:
    """A task of any number from 1 to 8 has workers that take it, in both overlays with classes."""
    for name in ("gpu", "keda"):
        objects = rendered(f"overlays/{name}")
        takes: list[int] = []
        for _, template in workers(objects):
            gpus = int(template["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", "0"))
            least = int(settings_of(objects, template).get("DLTASK_MIN_DEVICE_NUM", "1"))
            takes += range(least, gpus + 1)
        assert sorted(takes) == list(range(1, 9)), name


@pytest.mark.parametrize("name", APPLIED)
def test_no_password_is_rendered(name: str) -> None:
    """The URI with its password comes from a Secret that is not in here; nobody reads it in a Deployment either."""
    objects = rendered(name)
    for one, template in workers(objects):
        (container,) = template["spec"]["containers"]
        assert {"secretRef": {"name": "dltask"}} in container["envFrom"], one["metadata"]["name"]
        assert "DLTASK_MONGODB_URI" not in settings_of(objects, template)
    # What is rendered of a Secret is base64 in `data`.
    text = yaml.safe_dump(objects)
    for secret in (one for one in objects if one["kind"] == "Secret"):
        text += "".join(subprocess.check_output(["base64", "-d"], input=v, text=True) for v in secret["data"].values())
        assert name == "overlays/dev"  # whose MongoDB has none
    assert "mongodb://" in text if name == "overlays/dev" else "mongodb://" not in text
    assert "@" not in text


@pytest.mark.parametrize("name", APPLIED)
def test_what_refers_to_a_name_finds_it(name: str) -> None:
    """Kustomize ends names in hashes and changes them: who names a ConfigMap, an account or a service must follow."""
    objects = rendered(name)
    there = {(one["kind"], one["metadata"]["name"]) for one in objects}
    for one, template in pod_templates(objects):
        pod = template["spec"]
        named = [("ConfigMap", volume["configMap"]["name"]) for volume in pod["volumes"] if "configMap" in volume]
        for container in pod["containers"]:
            named += [
                ("ConfigMap", it["configMapRef"]["name"]) for it in container.get("envFrom", ()) if "configMapRef" in it
            ]
            # Without a tag it is whatever was pushed last.
            assert container["image"] in (f"dltask:{version('dltask')}", "mongo:7"), one["metadata"]["name"]
        if "serviceAccountName" in pod:
            named.append(("ServiceAccount", pod["serviceAccountName"]))
        assert set(named) <= there, one["metadata"]["name"]
    assert {one["metadata"].get("namespace", "dltask") for one in objects} == {"dltask"}


def test_a_budget_covers_no_pods_of_jobs() -> None:
    """Nothing scales a Job: a budget over its pods cannot be computed, and none of them could be evicted any more."""
    for name in APPLIED:
        objects = rendered(name)
        wanted = only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items()
        covered = {
            one["kind"] for one, template in pod_templates(objects) if wanted <= template["metadata"]["labels"].items()
        }
        assert covered == {"Deployment"}


def test_the_network_is_closed_but_for_what_is_needed() -> None:
    """Out: names and MongoDB. In: the port of page and metrics, and not from everywhere."""
    policy = only(rendered("base"), "NetworkPolicy")["spec"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53, 27017}
    assert all(rule["from"] for rule in policy["ingress"])
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == {"http"}
    for name in APPLIED:
        objects = rendered(name)
        wanted = only(objects, "NetworkPolicy", "dltask")["spec"]["podSelector"]["matchLabels"].items()
        for one, template in workers(objects):
            assert wanted <= template["metadata"]["labels"].items(), (name, one["metadata"]["name"])


def test_kueue_finds_its_label_on_every_job() -> None:
    """KEDA copies the labels of a ScaledJob to its Jobs; one without would run beside all quotas."""
    jobs = [one for one in rendered("overlays/kueue") if one["kind"] == "ScaledJob"]
    assert len(jobs) == 4
    assert {one["metadata"]["labels"].get("kueue.x-k8s.io/queue-name") for one in jobs} == {"dltask"}
    assert all(one["spec"]["jobTargetRef"].get("suspend") is None for one in jobs)  # that is Kueue's to set


def test_the_overlays_are_documented() -> None:
    """Each is a heading in docs/kubernetes.md."""
    text = (ROOT.parent / "docs" / "kubernetes.md").read_text()
    assert all(f"k8s/overlays/{name}" in text for name in OVERLAYS)


def test_the_check_of_several_nodes_finds_its_ranks() -> None:
    """Two agents of torchrun with two ranks each, as the JobSet starts them on two nodes, over gloo."""
    container = only(rendered("overlays/multinode"), "JobSet")["spec"]["replicatedJobs"][0]["template"]["spec"][
        "template"
    ]["spec"]["containers"][0]
    port = "29517"
    changed = {"--nproc-per-node": "2", "--master-addr": "127.0.0.1", "--master-port": port}

    def command(rank: int) -> list[str]:
        options = [option.partition("=") for option in container["command"][1:-1]]
        values = {
            name: changed.get(name, value.replace("$(JOB_COMPLETION_INDEX)", str(rank))) for name, _, value in options
        }
        program = str(ROOT / "overlays" / "multinode" / container["command"][-1].rpartition("/")[2])
        return [sys.executable, "-m", "torch.distributed.run", *(f"{k}={v}" for k, v in values.items()), program]

    agents = [
        subprocess.Popen(command(rank), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    said = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert '{"nodes": 2, "ranks": 4, "backend": "gloo"}' in said[0][0] + said[1][0]
