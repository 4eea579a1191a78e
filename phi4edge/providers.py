"""What may run the encoders: execution providers of onnxruntime for processors and NPUs, under names of ours.

>>> choose("auto", ["OpenVINOExecutionProvider", "CPUExecutionProvider"])
'cpu'

An onnxruntime has the providers that it was built with: the usual package has the processor's, and Core ML on macOS.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from phi4edge.errors import UnsupportedError, UsageError

AUTO = "auto"
CPU = "cpu"
_BUILD = "needs an onnxruntime that was built with it"


@dataclass(frozen=True, slots=True)
class Provider:
    """One way to run a graph.

    options: for onnxruntime; ``{threads}`` stands for the number of threads.  automatic: whether ``auto`` may choose
    it.  session: more configuration of the session.  peaks: memory that opening and running an encoder takes, in sizes
    of its file, by precision; None where we do not know.
    """

    name: str  # onnxruntime's
    hint: str  # how to get it
    options: Mapping[str, str] = field(default_factory=dict)
    automatic: bool = False
    session: Mapping[str, str] = field(default_factory=dict)
    peaks: Mapping[str, float] | None = None


# In benchmarks/records/encoders.jsonl the peaks for vision and audio, less 60 MB of Python, are 1.1 and 1.45 times the
# file for fp32, 2.4 and 2.5 times for int8, and 3.1 times for fp16, whose matrices become float32.
_CPU_PEAKS = {"fp32": 1.5, "int8": 2.5, "fp16": 3.2}
# Seen with 1.24.1 and encoders of 50 to 340 MB: OpenVINO keeps several copies, and many more of 8-bit matrices.
_OPENVINO_PEAKS = {"fp32": 5.0, "int8": 20.0, "fp16": 10.0}

# "auto" takes the first that is there and automatic.  Nobody should get other embeddings because a package is there:
# NPUs compute in float16 or 8 bits, and what runs on processors rounds int8 encoders otherwise than "cpu" does, takes
# longer to load and leaves a part of the graph to it.  So these are used when they are asked for.
PROVIDERS: Mapping[str, Provider] = {
    # OpenVINO would compute in bfloat16 where the processor can.
    "openvino": Provider(
        "OpenVINOExecutionProvider",
        "install onnxruntime-openvino in place of onnxruntime",
        {"device_type": "CPU", "precision": "FP32", "num_of_threads": "{threads}"},
        peaks=_OPENVINO_PEAKS,
    ),
    # All or nothing: where onnxruntime may fall back to the CPU, OpenVINO does too, which cannot be seen from outside.
    "openvino-npu": Provider(
        "OpenVINOExecutionProvider",
        "install onnxruntime-openvino in place of onnxruntime",
        {"device_type": "NPU"},
        session={"session.disable_cpu_ep_fallback": "1"},
        peaks=_OPENVINO_PEAKS,
    ),
    "qnn": Provider(
        "QNNExecutionProvider", "install 'onnxruntime-qnn<2' in place of onnxruntime", {"backend_type": "htp"}
    ),
    "coreml": Provider(
        "CoreMLExecutionProvider",
        "onnxruntime for macOS has it",
        {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndNeuralEngine"},
    ),
    "vitisai": Provider("VitisAIExecutionProvider", "it comes with the Ryzen AI software of AMD"),
    "cann": Provider("CANNExecutionProvider", "install onnxruntime-cann in place of onnxruntime"),
    "nnapi": Provider("NnapiExecutionProvider", _BUILD),
    "vsinpu": Provider("VSINPUExecutionProvider", _BUILD),
    "rknpu": Provider("RknpuExecutionProvider", _BUILD),
    "xnnpack": Provider("XnnpackExecutionProvider", _BUILD, {"intra_op_num_threads": "{threads}"}),
    "dnnl": Provider("DnnlExecutionProvider", _BUILD),
    CPU: Provider("CPUExecutionProvider", "install onnxruntime", automatic=True, peaks=_CPU_PEAKS),
}


def check_name(name: str) -> None:
    """UsageError for what is neither "auto" nor in the table."""
    if not isinstance(name, str) or (name != AUTO and name not in PROVIDERS):
        raise UsageError(f"{name!r:.80} is not one of {', '.join((AUTO, *PROVIDERS))}", field="provider")


def installed(available: Collection[str]) -> list[str]:
    """Our names of what an onnxruntime has, which calls it ``available``."""
    return [name for name, provider in PROVIDERS.items() if provider.name in available]


def choose(name: str, available: Collection[str]) -> str:
    """The provider to use; never "auto".

    Raises UsageError for a name that there is not, UnsupportedError for one that this onnxruntime does not have.
    """
    check_name(name)
    names = installed(available)
    if name == AUTO:
        return next((each for each in names if PROVIDERS[each].automatic), CPU)
    if name not in names:
        raise UnsupportedError(
            f"this onnxruntime does not have '{name}', only {', '.join(names) or 'providers that we do not use'}",
            field="provider",
            hint=PROVIDERS[name].hint,
        )
    return name


def memory_need(name: str, file_size: int, precision: str) -> int:
    """Bytes that an encoder of this size takes on a provider; for an unknown precision the most of all."""
    peaks = PROVIDERS[name].peaks or _CPU_PEAKS
    return int(file_size * peaks.get(precision, max(peaks.values())))
