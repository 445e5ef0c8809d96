"""Under faults of workers and database nothing is lost, nothing runs twice, and nothing is left over."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.timeout(900)
def test_a_short_run_keeps_every_invariant() -> None:
    """A minute of faults, drawn by a seed (CHAOS_SEED), and the quiet after it; `make chaos` is the long form."""
    command = [sys.executable, "-m", "tests.chaos", "--seconds", "60", "--workers", "3"]
    seed = os.environ.get("CHAOS_SEED", "3")
    done = subprocess.run([*command, "--seed", seed], capture_output=True, text=True, timeout=800)
    assert done.stdout, done.stderr[-5000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["good"], done.stdout[-10_000:]
    assert report["tasks"] > 20
    assert sum(report["faults"].values()) > 5
