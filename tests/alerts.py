"""The alert rules, as Prometheus' own `promtool` judges them (Debian's package `prometheus`)."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml

from tests.scrape import Samples

ALERTS = Path(__file__).parents[1] / "monitoring" / "alerts.yaml"

#: Longer than any alert looks back and waits.
_MINUTES = 60


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """What promtool says. Without it the test fails in CI, and is skipped elsewhere."""
    program = shutil.which("promtool")
    if program is None:
        reason = "promtool is not there: apt-get install prometheus"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=60)


def fires(alert: str, before: Samples, now: Samples) -> bool:
    """Whether the alert fires where a worker was scraped as `before` for an hour, and as `now` for another one."""
    series = []
    for (name, labels), value in now.values.items():
        old = before.values.get((name, labels))
        told = ", ".join(f'{label}="{value}"' for label, value in sorted({*labels, ("instance", "w"), ("job", "j")}))
        first = f"_x{_MINUTES - 1}" if old is None else f"{old}x{_MINUTES - 1}"
        series.append({"series": f"{name}{{{told}}}", "values": f"{first} {value}x{_MINUTES}"})
    asked = f'count(max_over_time(ALERTS{{alertname="{alert}", alertstate="firing"}}[{_MINUTES}m])) or vector(0)'
    question = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": series,
                "promql_expr_test": [
                    {
                        "expr": f"{asked} > bool 0",
                        "eval_time": f"{2 * _MINUTES}m",
                        "exp_samples": [{"labels": "{}", "value": 1}],
                    }
                ],
            }
        ],
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(question, file)
        file.flush()
        said = promtool("test", "rules", file.name)
    if said.returncode != 0:
        # The one answer that is not an error of the question.
        assert "got:[\n" in said.stdout + said.stderr or "got:" in said.stdout + said.stderr, said
    return said.returncode == 0
