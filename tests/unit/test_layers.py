"""The arrows between the packages run one way, and the service does not pay for what only its child needs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Seconds and hundreds of megabytes each, which an idle service must not cost.
HEAVY = {"torch", "torchvision", "cv2", "onnxruntime", "onnx", "matplotlib", "faster_coco_eval", "pycocotools", "numpy"}


@pytest.mark.parametrize("module", ["service.app", "service.cli", "handlers.task_process", "handlers.detection.job"])
def test_importing_the_service_loads_nothing_heavy(module: str) -> None:
    """Not the service, not the command line, not the platform's interface, not the contract with the child."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert module.partition(".")[0] in loaded
    assert loaded & HEAVY == set()


def test_the_layers_hold() -> None:
    """schemas <- handlers <- service, and the other contracts in pyproject.toml."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout
