"""What `handlers.detection.probe` finds out, as the worker and `dltask doctor` read it. Needs no torch."""

from pydantic import BaseModel, ConfigDict


class Facts(BaseModel):
    """About the child's Python. Versions are absent where the library cannot be loaded; errors are one line each."""

    model_config = ConfigDict(frozen=True)

    python: str = ""
    torch: str | None = None
    torch_error: str | None = None
    #: The CUDA that torch was built for, `13.0`; None for a build without.
    torch_cuda: str | None = None
    #: GPUs that torch can use.
    gpus: int = 0
    #: Why it can use none, or not all of them.
    cuda_error: str | None = None
    onnxruntime: str | None = None
    onnxruntime_error: str | None = None
    #: onnxruntime's execution providers, as built.
    providers: tuple[str, ...] = ()
    #: Why onnxruntime cannot use the GPU although it is built for it.
    provider_error: str | None = None
    #: Where the ImageNet weights lie, with the right hash; None where they would have to be downloaded.
    weights: str | None = None
    weights_error: str | None = None
