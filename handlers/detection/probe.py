"""What the child's Python can do: `python -m handlers.detection.probe [--run]` prints one JSON object (`Facts`).

Run by `dltask doctor`, and by a worker that sees a GPU, before it promises that GPU to anybody. `--run` computes
something on each GPU too: a driver or a library that does not fit often shows only then.
"""

import os
import platform
import sys
import warnings
from collections.abc import Callable

from handlers.detection.facts import Facts


def main() -> int:
    """Print the facts. Returns the exit code, 0: what is wrong is a fact too."""
    # Libraries print, and what they print must not end up beside the object.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    run = "--run" in sys.argv[1:]
    facts: dict[str, object] = {"python": platform.python_version()}
    for look in (_torch, _onnxruntime, _weights):
        facts |= look(run)
    with out:
        out.write(Facts.model_validate(facts).model_dump_json())
    return 0


# Broad catches throughout: whatever a library raises that is missing, damaged or built for another machine is what is
# being asked for, and one of them that fails must not keep the others from being looked at.


def _torch(run: bool) -> dict[str, object]:
    try:
        import torch
    except Exception as error:  # noqa: BLE001
        return {"torch_error": _said(error)}
    facts: dict[str, object] = {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    if torch.version.cuda is None:
        return facts
    try:
        # `is_available` swallows the reason, or only warns of it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()  # type: ignore[no-untyped-call]
            facts["gpus"] = torch.cuda.device_count()
            if run:
                for index in range(torch.cuda.device_count()):
                    torch.ones(8, device=f"cuda:{index}").sum().item()
    except Exception as error:  # noqa: BLE001
        facts["cuda_error"] = _said(error)
    return facts


def _onnxruntime(run: bool) -> dict[str, object]:
    try:
        import onnxruntime
    except Exception as error:  # noqa: BLE001
        return {"onnxruntime_error": _said(error)}
    facts: dict[str, object] = {
        "onnxruntime": onnxruntime.__version__,
        "providers": tuple(onnxruntime.get_available_providers()),
    }
    if run and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        facts["provider_error"] = _quietly(_run_onnx)
    return facts


def _run_onnx() -> None:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", [value], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    # As a test does it (`predict`): torch's wheels bring CUDA and cuDNN.
    onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    onnx.checker.check_model(model)
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError("it falls back to the CPU, since a library of CUDA or cuDNN cannot be loaded")


def _quietly(work: Callable[[], None]) -> str | None:
    try:
        work()
    except Exception as error:  # noqa: BLE001
        return _said(error)
    return None


def _weights(run: bool) -> dict[str, object]:
    try:
        from handlers.detection.weights import local_weights

        return {"weights": local_weights()}
    except Exception as error:  # noqa: BLE001
        return {"weights_error": _said(error)}


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]


if __name__ == "__main__":
    sys.exit(main())
