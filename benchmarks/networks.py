"""What each network costs at each scale: input, parameters, operations, and time of an image on one core.

    python benchmarks/networks.py [--networks MobileNet …] [--scopes NORMAL …]

Weights are random: they change nothing here. `GFLOPs` are counted by torch (2 for a multiplication with addition) in
the network, without decoding and suppression. The times are CPU time of one thread, so other load disturbs them little:
`onnx` is the exported file with all that is in it, in ONNX Runtime; the floor is ONNX Runtime on the network alone,
without decoding and suppression; the peer is torch, eager, with the same decoding and suppression.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch.utils.flop_counter import FlopCounterMode

from handlers.detection.export import export
from handlers.detection.networks import NETWORKS, Detector, Network
from handlers.detection.suppression import best_boxes
from schemas.enums import ModelScopeClass

CLASSES = tuple(f"class {number}" for number in range(6))
_REPEATS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--scopes", nargs="+", default=[scope.name for scope in ModelScopeClass])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | scale | input | parameters, M | GFLOPs | onnx, ms | floor, ms | ratio | torch, ms | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in chosen.networks:
        for scope in chosen.scopes:
            size = NETWORKS[name].input_sizes[ModelScopeClass[scope]]
            network = NETWORKS[name].make(len(CLASSES), size, None).eval()
            ours, floor, peer = times(network)
            parameters = sum(p.numel() for p in network.parameters()) / 1e6
            print(
                f"| `{name}` | `{scope}` | {size} | {parameters:.1f} | {operations(network) / 1e9:.1f} | {ours:.0f} | "
                f"{floor:.0f} | {ours / floor:.2f} | {peer:.0f} | {ours / peer:.2f} |",
                flush=True,
            )


def operations(network: Network) -> int:
    """Of one image."""
    images = torch.zeros(1, network.input_size, network.input_size, 3, dtype=torch.uint8)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(images)
    return counter.get_total_flops()


def times(network: Network) -> tuple[float, float, float]:
    """Milliseconds for one image: the exported file, the network in ONNX Runtime, and torch."""
    images = np.random.default_rng(0).integers(0, 256, (1, network.input_size, network.input_size, 3), np.uint8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        whole, bare = Path(folder) / "whole.onnx", Path(folder) / "bare.onnx"
        export(network, CLASSES, whole)
        torch.onnx.export(
            network,
            (torch.from_numpy(images),),
            bare,
            dynamo=True,
            input_names=["images"],
            opset_version=18,
            verbose=False,
        )
        ours = onnxruntime.InferenceSession(whole, options, providers=["CPUExecutionProvider"])
        floor = onnxruntime.InferenceSession(bare, options, providers=["CPUExecutionProvider"])
    detector = Detector(network).eval()

    def eager() -> None:
        with torch.inference_mode():
            boxes, scores = detector(torch.from_numpy(images))
            best_boxes(boxes[0], scores[0])

    return (
        milliseconds(lambda: ours.run(None, {"images": images})),
        milliseconds(lambda: floor.run(None, {"images": images})),
        milliseconds(eager),
    )


def milliseconds(work: Callable[[], object]) -> float:
    """CPU time of this thread, the median of some runs after one that warms up."""
    work()
    taken = []
    for _ in range(_REPEATS):
        begin = time.thread_time()
        work()
        taken.append(1000 * (time.thread_time() - begin))
    return statistics.median(taken)


if __name__ == "__main__":
    main()
