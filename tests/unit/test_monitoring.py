"""Metrics, their page, the alert rules and the dashboard say the same; and each alert is provoked, and is not."""

import json
import re
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import yaml

from schemas.enums import TaskErrorCode
from service.metrics import ERRORS, Metrics
from tests.alerts import ALERTS, promtool
from tests.scrape import parsed

ROOT = Path(__file__).parents[2]
RULES: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((ROOT / "monitoring" / "dashboard.json").read_text())
SCENARIOS = ROOT / "tests" / "unit" / "alerts.test.yaml"

_NAME = re.compile(r"\bdltask_[a-z_]+")


def families() -> dict[str, str]:
    """Every metric of ours with its type, as a scrape tells them."""
    text = Metrics().text()[0].decode()
    found = dict(re.findall(r"^# TYPE (dltask_\S+) (\w+)$", text, re.MULTILINE))
    return {name: kind for name, kind in found.items() if not name.endswith("_created")}


def sampled() -> set[str]:
    """Every name that a query can ask for."""
    histogram = {
        f"{name}_{part}"
        for name, kind in families().items()
        if kind == "histogram"
        for part in ("bucket", "sum", "count")
    }
    return histogram | {name for name, kind in families().items() if kind != "histogram"}


def queries() -> list[str]:
    """Every query of the dashboard."""
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def test_every_metric_is_on_its_page_and_no_other() -> None:
    """With its type."""
    rows = (line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `dltask_"))
    written = {}
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert len(cells) == 5, row
        written |= dict.fromkeys(_NAME.findall(cells[0]), cells[1])
    assert written == families()


def test_alerts_and_dashboard_ask_for_what_is_there() -> None:
    asked = {name for text in [*queries(), *(rule["expr"] for rule in RULES)] for name in _NAME.findall(text)}
    assert asked <= sampled()
    # And nothing is shown nowhere.
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) if name not in families() else name for name in asked}
    assert shown == set(families())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    """What is wrong in one line, what that means, and where to read on."""
    assert rule["labels"]["severity"] in ("critical", "warning")
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert "\n" not in notes["summary"].strip()
    page, anchor = notes["runbook_url"].split("#")
    assert page == "docs/operations.md"
    runbook = ROOT / page
    if runbook.exists():
        headings = re.findall(r"^#+ (.+)$", runbook.read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_alert_is_provoked() -> None:
    """By a scenario of its own; and one of peace, in which none fires, has every metric that any of them asks for."""
    text = SCENARIOS.read_text()
    assert set(re.findall(r'ALERTS\{alertname="(\w+)"', text)) == {rule["alert"] for rule in RULES}
    peace = str(yaml.safe_load(text)["tests"][:2])
    assert {name for rule in RULES for name in _NAME.findall(rule["expr"])} <= set(_NAME.findall(peace))


def test_the_rules_are_right() -> None:
    said = promtool("check", "rules", ALERTS)
    assert said.returncode == 0, said
    assert f"{len(RULES)} rules found" in said.stdout


def test_each_alert_fires_when_it_should_and_only_then() -> None:
    said = promtool("test", "rules", SCENARIOS)
    assert said.returncode == 0, said.stdout + said.stderr


def test_the_dashboards_queries_are_right(tmp_path: Path) -> None:
    """As rules, since promtool reads no dashboards; Grafana fills in its variables."""
    rules = [
        {
            "record": f"panel:{number}",
            "expr": query.replace("$__rate_interval", "5m").replace("$namespace", ".*").replace("$job", ".*"),
        }
        for number, query in enumerate(queries())
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    said = promtool("check", "rules", file)
    assert said.returncode == 0, said.stdout + said.stderr


def test_a_dashboard_for_any_grafana() -> None:
    """No data source of somebody's is in it, and panels have titles and places of their own."""
    assert {json.dumps(panel["datasource"]) for panel in DASHBOARD["panels"] if panel["type"] != "row"} == {
        json.dumps({"type": "prometheus", "uid": "${datasource}"})
    }
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len(set(titles)) == len(titles)


def test_each_has_its_own_registry() -> None:
    """Two workers in one process, as in tests, do not share numbers; the client's global registry has none of ours."""
    one, other = Metrics(), Metrics()
    one.child_started()
    assert parsed(one.text()[0].decode())("child_starts_total") == 1
    assert parsed(other.text()[0].decode())("child_starts_total") == 0
    assert b"dltask" not in prometheus_client.generate_latest()


def test_labels_are_words_of_ours() -> None:
    """Whatever a handler calls its error: else each new word would be a series more."""
    metrics = Metrics()
    before = parsed(metrics.text()[0].decode())
    for number in range(100):
        metrics.attempt_over("TRAIN", f"attempt {number}", "failed", f"kind {number}", 1)
        metrics.attempt_over("TRAIN", f"attempt {number}", "retried", f"kind {number}", 1)
        metrics.attempt_over("TRAIN", f"attempt {number}", "succeeded", f"kind {number}", 1)
    after = parsed(metrics.text()[0].decode())
    assert after("tasks_ended_total", state="FAILED", error="other") == 100
    assert after("tasks_retried_total", error="other") == 100
    assert after("tasks_ended_total", state="SUCCEEDED", error="") == 100
    told = {label for _, labels in after.values for label in labels}
    known = {label for _, labels in before.values for label in labels}
    assert told - known <= {("outcome", "failed"), ("outcome", "retried"), ("outcome", "succeeded")} | {
        label for label in told if label[0] == "le"
    }


def test_alerts_can_see_the_first_of_each_kind() -> None:
    """A series that begins with its first event shows no increase: those that alerts count begin at 0."""
    seen = parsed(Metrics().text()[0].decode())
    for error in ERRORS:
        assert (
            "dltask_tasks_ended_total",
            frozenset({("type", "TEST"), ("state", "FAILED"), ("error", error)}),
        ) in seen.values
    for name in ("leases_lost_total", "tasks_taken_back_total", "tasks_retried_total", "stream_opens_total"):
        assert seen.has(name)
        assert seen(name) == 0
    codes = {value for (name, labels) in seen.values for label, value in labels if name == "dltask_admissions_total"}
    assert codes == {code.name for code in TaskErrorCode}


def test_the_operator_gets_the_same_rules() -> None:
    rule = yaml.safe_load((ROOT / "k8s" / "components" / "monitoring" / "prometheusrule.yaml").read_text())
    assert rule["kind"] == "PrometheusRule"
    assert rule["spec"] == yaml.safe_load(ALERTS.read_text())
