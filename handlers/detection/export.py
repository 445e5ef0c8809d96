"""The trained network as one ONNX file: decoding, non-maximum suppression and voting are part of the graph.

Input `images`: uint8 [N, S, S, 3], RGB, stretched to the square (`data.fit`); N is free.
Outputs: `boxes` float32 [N, 100, 4], corners as fractions of the image; `scores` float32 [N, 100], descending;
`class_ids` int64 [N, 100], from 1, where 0 marks a row that is no detection.
The metadata have `class_names` (JSON) and `input_size`; and, once the model is measured, `thresholds` (JSON, in the
order of `class_names`, null is unknown) and `fingerprints` of the training images (`handlers.detection.fingerprints`).
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from handlers.detection.batch_norm import fold_batch_norm
from handlers.detection.fingerprints import Fingerprints, encoded
from handlers.detection.networks.base import Detector, Network
from handlers.detection.suppression import append_suppression

_OPSET = 18


def export(network: Network, class_names: tuple[str, ...], path: Path) -> None:
    """Write `network` to the ONNX file `path`."""
    detector = Detector(copy.deepcopy(network).cpu()).eval()
    fold_batch_norm(detector)
    size = network.input_size
    # Traced with one image, and the number freed afterwards: torch takes several times as long over a free one.
    program = torch.onnx.export(
        detector,
        (torch.zeros(1, size, size, 3, dtype=torch.uint8),),
        dynamo=True,
        input_names=["images"],
        output_names=["all_boxes", "all_scores"],
        opset_version=_OPSET,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    _free_batch(model.graph)
    append_suppression(model.graph, network.predictions)
    facts = {"class_names": json.dumps(list(class_names), ensure_ascii=False), "input_size": str(size)}
    helper.set_model_props(model, facts)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def add_facts(path: Path, thresholds: Sequence[float | None], fingerprints: Fingerprints) -> None:
    """Write what is known of a model only once it is measured into the metadata of its file `path`."""
    model = onnx.load(path)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    facts |= {"thresholds": json.dumps(list(thresholds)), "fingerprints": encoded(fingerprints)}
    helper.set_model_props(model, facts)
    path.write_bytes(model.SerializeToString())


def _free_batch(graph: onnx.GraphProto) -> None:
    """Let the graph, traced with one image, take any number of them.

    That one image stands in the sizes that it reshapes and resizes to: both keep their first axis, the images'.
    `check_export` runs the file on several images, and would tell if it stood anywhere else.
    """
    sizes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        place = {"Reshape": 1, "Resize": 3}.get(node.op_type)
        size = sizes.get(node.input[place]) if place is not None and place < len(node.input) else None
        if size is None or size[0] != 1:
            continue
        # Other nodes may share the constant.
        node.input[place] = f"{node.name}/any_batch"
        if node.op_type == "Reshape":
            # 0 is "as it comes", unless `allowzero` says that it is a zero.
            kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)
            freed = np.array([0, *size[1:]])
        else:
            node.attribute.append(helper.make_attribute("axes", range(1, len(size))))
            freed = size[1:]
        graph.initializer.append(numpy_helper.from_array(freed, node.input[place]))
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    del graph.value_info[:]  # sizes of intermediates, of one image
