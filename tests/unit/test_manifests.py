"""The Kubernetes manifests keep the rules that the service relies on, and name settings that exist."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings

BASE = Path(__file__).resolve().parents[2] / "k8s" / "base"


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    """The pod that the Deployment makes."""
    deployment = yaml.safe_load((BASE / "deployment.yaml").read_text())
    assert deployment["kind"] == "Deployment"
    template = deployment["spec"]["template"]
    # A selector that misses its own pods is refused by the server only.
    assert deployment["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    return template["spec"]


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    """Its one container."""
    (only,) = pod["containers"]
    return only


@pytest.fixture(scope="module")
def env(container: dict[str, Any]) -> dict[str, str]:
    """The settings that the manifest gives in plain text."""
    return {entry["name"]: entry["value"] for entry in container["env"]}


def test_every_file_in_the_folder_is_applied() -> None:
    """A manifest that the kustomization forgets would never reach a cluster."""
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(path.name for path in BASE.glob("*.yaml") if path.name != "kustomization.yaml")


def test_the_settings_exist_and_are_valid(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelled DLTASK_ name would be ignored silently, a bad value would end every pod at its start."""
    assert set(env) <= {f"DLTASK_{field.upper()}" for field in Settings.model_fields}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DLTASK_MONGODB_URI", "mongodb://example.invalid/")
    settings = Settings()
    assert str(settings.cache_dir) == env["DLTASK_CACHE_DIR"]


def test_the_uri_with_its_password_comes_from_the_secret(container: dict[str, Any], env: dict[str, str]) -> None:
    """Nobody who may read a Deployment reads a password there."""
    assert "DLTASK_MONGODB_URI" not in env
    assert container["envFrom"] == [{"secretRef": {"name": "dltask"}}]


def test_a_pod_has_the_time_to_snapshot_and_to_release_its_task(pod: dict[str, Any], env: dict[str, str]) -> None:
    """Kubernetes kills later than the service has promised to be gone."""
    assert pod["terminationGracePeriodSeconds"] >= float(env["DLTASK_GRACE_SECONDS"]) + 10


def test_a_worker_has_one_gpu_and_memory_of_its_own(pod: dict[str, Any], container: dict[str, Any]) -> None:
    """Without limits a training would take its neighbours' memory; /dev/shm is 64 MB unless it is mounted."""
    resources = container["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == 1
    assert "memory" in resources["limits"]
    assert {"cpu", "memory"} <= resources["requests"].keys()
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_it_runs_under_the_restricted_pod_security_standard(pod: dict[str, Any], container: dict[str, Any]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, and a read-only root."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False


def test_what_is_written_lies_on_a_volume(container: dict[str, Any], env: dict[str, str]) -> None:
    """The root is read-only: the cache and the temporary files need volumes."""
    assert {env["DLTASK_CACHE_DIR"], "/tmp"} <= {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_image_runs_as_the_user_of_the_manifest(pod: dict[str, Any]) -> None:
    """The volumes belong to the pod's group; the image's own user must be in it."""
    dockerfile = (BASE.parents[1] / "Dockerfile").read_text()
    ids = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    assert f"\nUSER {ids}\n" in dockerfile
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
