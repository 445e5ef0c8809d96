"""The run-book names what exists: events, alerts, and the tests that produce each symptom."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RUNBOOK = (ROOT / "docs" / "operations.md").read_text()


def entries() -> Iterator[tuple[str, str]]:
    """Title and text of each symptom."""
    for part in re.split(r"^### ", RUNBOOK, flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        yield title, re.split(r"^## ", text, flags=re.MULTILINE)[0]


ENTRIES = dict(entries())
TESTS = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}


def test_each_has_its_line_in_the_table_at_the_top() -> None:
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", RUNBOOK, flags=re.MULTILINE)]
    assert numbers == list(range(1, len(ENTRIES) + 1))
    assert len(ENTRIES) >= 20


@pytest.mark.parametrize("title", ENTRIES)
def test_a_symptom_says_how_it_shows_what_to_do_and_where_it_was_produced(title: str) -> None:
    entry = ENTRIES[title]
    assert [line.split("**")[1] for line in entry.splitlines() if line.startswith("- **")] == ["Shows", "Do"]
    tried = entry[entry.index("- Tried in ") :]
    for file in re.findall(r"`(?:\w+/)*(test_\w+\.py)`", tried):
        assert file in TESTS
    for name in re.findall(r"`(test_\w+)`", tried):
        assert any(f"def {name}(" in TESTS[file] for file in re.findall(r"(test_\w+\.py)", tried)), name


def test_its_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", RUNBOOK, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", RUNBOOK)) <= anchors


def test_what_it_quotes_is_what_the_service_says() -> None:
    """Two words and more in code style are an event, or what `dltask status` says; each stands so in the code."""
    code = "".join(path.read_text() for folder in ("service", "handlers") for path in (ROOT / folder).rglob("*.py"))
    quoted = set(re.findall(r"`([a-z]+(?:,? [a-z]+)+)`", RUNBOOK))
    commands = {quote for quote in quoted if quote.split()[0] in ("dltask", "kubectl", "make")}
    assert {quote for quote in quoted - commands if quote not in code} == set()


def test_its_alerts_exist_and_lead_back_to_it() -> None:
    """Each alert has a symptom, and links to it."""
    groups = yaml.safe_load((ROOT / "monitoring" / "alerts.yaml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    assert set(re.findall(r"`(Dltask\w+)`", RUNBOOK)) == alerts


def test_its_metrics_exist() -> None:
    metrics = (ROOT / "docs" / "metrics.md").read_text()
    assert {name for name in re.findall(r"`(dltask_[a-z_]+)`", RUNBOOK) if f"`{name}`" not in metrics} == set()
