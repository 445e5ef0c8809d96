"""What a training step gains, on the CPU, by how the child sets up its process.

The child has threads that wait for each other sleep (`handlers.detection.__main__`), and freed memory kept
(`handlers.detection.devices.keep_freed_memory`). Prints the wall time of a step with that and with torch as it comes,
alone on the machine and with a second training beside it, as ratios. The two are run in turn, `--rounds` times.
"""

import argparse
import os
import statistics
import subprocess
import sys

STEP = """
import sys, time, torch
from handlers.detection.devices import keep_freed_memory
if "ours" in sys.argv:
    keep_freed_memory()
from handlers.detection.networks.ssd import mobilenet_v2_ssd
network = mobilenet_v2_ssd(3, 320).train().to(memory_format=torch.channels_last)
images = torch.randint(0, 255, (10, 320, 320, 3), dtype=torch.uint8)
times = []
for _ in range(6):
    began = time.perf_counter()
    offsets, logits = network(images)
    (offsets.mean() + logits.mean()).backward()
    times.append(time.perf_counter() - began)
print(min(times[1:]))
"""


def step_seconds(name: str, at_once: int) -> float:
    """Seconds of a step of batch 10 at 320 pixels: the mean over processes of each one's best."""
    env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    if name == "ours":
        env["OMP_WAIT_POLICY"] = "PASSIVE"
    command = [sys.executable, "-c", STEP, name]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(at_once)]
    return statistics.mean(float(process.communicate()[0]) for process in running)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    for at_once in (1, 2):
        pairs = [(step_seconds("ours", at_once), step_seconds("bare", at_once)) for _ in range(rounds)]
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        print(
            f"{at_once} training(s) at once: ours {statistics.median(p[0] for p in pairs):.2f} s a step, torch as it "
            f"comes {statistics.median(p[1] for p in pairs):.2f} s, ratio {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} … {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
