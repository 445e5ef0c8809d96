"""The alert rules, as Prometheus' own `promtool` judges them (Debian's package `prometheus`)."""

import math
import os
import re
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


def firing(before: Samples, now: Samples) -> set[str]:
    """The alerts that fire where a worker was scraped as `before` for an hour, and as `now` for another one."""
    series = []
    for (name, labels), value in now.values.items():
        old = before.values.get((name, labels))
        told = ", ".join(f'{label}="{word}"' for label, word in sorted({*labels, ("instance", "w"), ("job", "j")}))
        first = f"_x{_MINUTES}" if old is None else f"{old}+0x{_MINUTES - 1}"
        if not math.isnan(value):
            series.append({"series": f"{name}{{{told}}}", "values": f"{first} {value}+0x{_MINUTES}"})
    question = {
        "expr": f'count by (alertname) (max_over_time(ALERTS{{alertstate="firing"}}[{_MINUTES}m]))',
        "eval_time": f"{2 * _MINUTES}m",
        # None: what promtool has against that is the answer.
        "exp_samples": [],
    }
    test = {"interval": "1m", "input_series": series, "promql_expr_test": [question]}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [test]}, file)
        file.flush()
        said = promtool("test", "rules", file.name)
    told = said.stdout + said.stderr
    if said.returncode == 0:
        return set()
    found = set(re.findall(r'{alertname="(\w+)"}', told))
    assert found, told
    return found
