"""What the child's environment (`handlers.detection.job.ENVIRONMENT`) is worth, on the CPU.

Prints the wall time of a training step with it and without it (the floor being torch as it comes), alone on the machine
and with a second training beside it, as ratios. The two are run in turn, `--rounds` times.
"""

import argparse
import os
import statistics
import subprocess
import sys

from handlers.detection.job import ENVIRONMENT

STEP = """
import time, torch
from handlers.detection.models import MobileNetSSD
network = MobileNetSSD(3, 320, None).train().to(memory_format=torch.channels_last)
images = torch.randint(0, 255, (10, 320, 320, 3), dtype=torch.uint8)
times = []
for _ in range(6):
    began = time.perf_counter()
    offsets, logits = network(images)
    (offsets.mean() + logits.mean()).backward()
    times.append(time.perf_counter() - began)
print(min(times[1:]))
"""


def step_seconds(environment: dict[str, str], at_once: int) -> float:
    """Seconds of a step of batch 10 at 320 pixels: the mean over processes of each one's best."""
    clean = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    running = [
        subprocess.Popen([sys.executable, "-c", STEP], env=clean | environment, stdout=subprocess.PIPE)
        for _ in range(at_once)
    ]
    return statistics.mean(float(process.communicate()[0]) for process in running)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    for at_once in (1, 2):
        pairs = [(step_seconds(ENVIRONMENT, at_once), step_seconds({}, at_once)) for _ in range(rounds)]
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        print(
            f"{at_once} training(s) at once: ours {statistics.median(p[0] for p in pairs):.2f} s a step, torch as it "
            f"comes {statistics.median(p[1] for p in pairs):.2f} s, ratio {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} … {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
