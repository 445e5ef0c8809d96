"""Every rendered object is valid for the oldest and the newest Kubernetes that we name, and for its CRD; strictly.

Strictly: a field that no schema knows is an error. The server would drop it and say nothing.
"""

import os
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.manifests import APPLIED, ROOT, kustomize, only, rendered

Object = dict[str, Any]

#: The oldest and the newest that is tried.
VERSIONS = ["1.30", "1.37"]

CRDS = {
    "ScaledJob": "keda.sh_scaledjobs.yaml",
    "TriggerAuthentication": "keda.sh_triggerauthentications.yaml",
    "JobSet": "jobset.x-k8s.io_jobsets.yaml",
    "ServiceMonitor": "monitoring.coreos.com_servicemonitors.yaml",
    "PrometheusRule": "monitoring.coreos.com_prometheusrules.yaml",
}


@pytest.fixture(scope="module")
def schemas() -> Path:
    """The folder of CRDs beside the checkout; only a developer's machine may lack it."""
    path = ROOT.parents[1] / "shared" / "k8s-schemas"
    if not path.is_dir():
        reason = f"the schemas of custom resources are not at {path}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """The base with the component for the Prometheus operator, as whoever applies it puts them together."""
    folder = tmp_path_factory.mktemp("monitored")
    to_root = os.path.relpath(ROOT, folder)
    content = {"resources": [f"{to_root}/base"], "components": [f"{to_root}/components/monitoring"]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return kustomize(folder)


def closed(schema: Any) -> Any:
    """The schema with every object closed to fields that it does not name, as the server prunes them."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    # `properties` itself is a dictionary of schemas, in which a field may have any name.
    fields = made.get("properties")
    is_schema = isinstance(fields, dict) and "type" in made and made.get("type") == "object"
    if is_schema and "additionalProperties" not in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


@cache
def crd_validator(path: Path, version: str) -> jsonschema.Draft202012Validator:
    """For one version of a custom resource."""
    versions = {one["name"]: one for one in yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]["versions"]}
    assert versions[version]["served"]
    schema = versions[version]["schema"]["openAPIV3Schema"]
    return jsonschema.Draft202012Validator(closed(schema))


def check_crd(schemas: Path, one: Object) -> None:
    """Raises jsonschema.ValidationError."""
    crd_validator(schemas / CRDS[one["kind"]], one["apiVersion"].rpartition("/")[2]).validate(one)


def jobs_in(one: Object) -> list[Object]:
    """The Jobs that a custom resource makes, as Kubernetes gets them."""
    match one["kind"]:
        case "ScaledJob":
            specs = [one["spec"]["jobTargetRef"]]
        case "JobSet":
            specs = [job["template"]["spec"] for job in one["spec"]["replicatedJobs"]]
        case _:
            specs = []
    return [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "made"}, "spec": spec} for spec in specs]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", APPLIED)
def test_it_is_valid_kubernetes(name: str, version: str) -> None:
    """Every object of Kubernetes' own, and every Job that a custom resource would make."""
    for one in rendered(name):
        for plain in jobs_in(one) if one["kind"] in CRDS else [one]:
            assert kubernetes_validate.validate(plain, version, strict=True) == version


@pytest.mark.parametrize("name", APPLIED)
def test_custom_resources_are_valid_for_their_definitions(name: str, schemas: Path) -> None:
    """KEDA's, and JobSet's."""
    for one in rendered(name):
        if one["kind"] in CRDS:
            check_crd(schemas, one)


def test_the_monitoring_component_is_valid(monitored: list[Object], schemas: Path) -> None:
    """It looks for the Service that the base has, at a port that this has."""
    added = [one for one in monitored if one["kind"] in CRDS]
    assert added
    for one in added:
        check_crd(schemas, one)
    monitor, service = only(monitored, "ServiceMonitor")["spec"], only(monitored, "Service")
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {point["port"] for point in monitor["endpoints"]} <= {port["name"] for port in service["spec"]["ports"]}


def test_a_misspelled_field_is_found(schemas: Path) -> None:
    """The checks above are strict: at the top, deep inside a pod, and in an object of Kubernetes' own."""
    job = next(one for one in rendered("overlays/keda") if one["kind"] == "ScaledJob")
    top, deep, wrong = deepcopy(job), deepcopy(job), deepcopy(job)
    top["spec"]["maxReplicas"] = 1
    deep["spec"]["jobTargetRef"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    wrong["spec"]["scalingStrategy"]["strategy"] = "precise"
    for bad in (top, deep, wrong):
        with pytest.raises(jsonschema.ValidationError):
            check_crd(schemas, bad)
    deployment = deepcopy(only(rendered("base"), "Deployment"))
    deployment["spec"]["template"]["spec"]["terminationGraceSeconds"] = 5
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)
