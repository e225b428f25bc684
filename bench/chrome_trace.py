"""GPU time by class of kernels, and the gaps between them, from a Chrome trace of torch.profiler.

A kernel belongs to the phase (a record_function range) in which the CPU launched it: the trace
gives launch and kernel the same correlation id. Everything in the phase "optimizer" counts as
optimiser, its matrix products included; elsewhere the first rule that matches the kernel's name
decides.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

OPTIMIZER, OTHER, GAPS = "optimiser", "other", "gaps"
PHASES = ("forward", "backward", "optimizer")

# Kernels of this project and of libraries have telling names; those of torch.compile
# (triton_*_fused_*) list the ATen ops they fuse. Its squared ReLU counts as quantise, also in bf16,
# where it writes no FP8; in the fused pass squared ReLU is in a GEMM's epilogue.
RULES = [
    (name, re.compile(pattern))
    for name, pattern in (
        (
            OPTIMIZER,
            r"^_?(momentum|apply|factors|unit_rows|initial_scale|shrink_rows|rescale|adamw"
            r"|adamw_scalars|symmetric_matmul|batched_matmul|block_squares|tensor_squares)_kernel",
        ),
        (
            "GEMM",
            r"^(linear_relu_squared|product|(relu|loss|rotary|add)_panel)_kernel",
        ),
        (
            "norm/rotary",
            r"^_?(residual_(mix|norm|gradients)|resid_lambda_grad|rotary_qk_norm|gate_logits)"
            r"(_fwd|_bwd)?(_tma)?_k",
        ),
        ("quantise", r"^_?(quantize|relu_squared|transpose)_kernel"),
        ("embedding", r"^_?(embed_smear|embedding_grad|spanning_segments|bigram_rows)(_.*)?_kern"),
        (
            "cross-entropy",
            r"^(fwd|bwd|rows|weighted|dx)_kernel$|triton_.*tanh|[sS]oft[mM]ax|nll_loss",
        ),
        ("attention", r"(?i)flash|fmha|sdpa|attention|attn|cudnn::fusion"),
        ("embedding", r"triton_.*(embedding_dense_backward|index_put)"),
        ("GEMM", r"(?i)nvjet|cutlass|xmma|gemm|gemv|splitkreduce|cublas|triton_tem_fused.*mm"),
        ("embedding", r"(?i)^(?!triton_).*(embedding|index|gather|sort)"),
        ("quantise", r"triton_.*(amax|scaled_mm|relu)|float8|amax|cast_transpose"),
        ("norm/rotary", r"triton_.*(rsqrt|pow|roll|sigmoid|embedding|xor)"),
        ("quantise", r"triton_poi_fused_.*(clone|_t_|_to_copy)"),
    )
]
CLASSES = ["GEMM", "quantise", "attention", "norm/rotary", "cross-entropy", "embedding"]
CLASSES += [OTHER, OPTIMIZER]


@dataclass(frozen=True)
class Kernel:
    """A kernel, copy or fill on the GPU; times in microseconds."""

    name: str
    start: float
    end: float
    phase: str  # of PHASES, or "" outside them


def classify(name, phase=""):
    """Class of a kernel by its name and the phase that launched it; one of CLASSES."""
    if phase == "optimizer":
        return OPTIMIZER
    return next((kind for kind, pattern in RULES if pattern.search(name)), OTHER)


def read_kernels(trace):
    """The Kernels of a Chrome trace in order of their start.

    One whose launch is not in the trace belongs to the phase of the kernel before it.
    """
    ranges, launches, found = [], {}, []
    for event in trace["traceEvents"]:
        kind, args = event.get("cat"), event.get("args", {})
        if kind == "user_annotation" and event["name"] in PHASES:
            ranges.append((event["ts"], event["ts"] + event["dur"], event["name"]))
        elif kind in ("cuda_runtime", "cuda_driver") and "correlation" in args:
            launches[args["correlation"]] = event["ts"]
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            found.append(event)
    kernels, phase = [], ""
    for event in sorted(found, key=lambda event: event["ts"]):
        launch = launches.get(event["args"].get("correlation"))
        if launch is not None:
            phase = next((name for start, end, name in ranges if start <= launch <= end), "")
        kernels.append(Kernel(event["name"], event["ts"], event["ts"] + event["dur"], phase))
    return kernels


def idle(kernels):
    """Microseconds without any kernel, by the phase of the kernel that ends the gap."""
    gaps, busy_until = defaultdict(float), None
    for kernel in kernels:
        if busy_until is not None and kernel.start > busy_until:
            gaps[kernel.phase] += kernel.start - busy_until
        busy_until = max(kernel.end, busy_until or kernel.end)
    return gaps


def breakdown(kernels, micro_steps, step_micro_steps):
    """Milliseconds and kernels per micro-step by class, {class: {"ms", "kernels"}}, with the gaps.

    Args:
        kernels: of one optimiser step, in order of their start.
        micro_steps: how many micro-steps that step had.
        step_micro_steps: how many a step has in training: they share the optimiser's time.
    """

    def share(phase):
        return 1 / (step_micro_steps if phase == "optimizer" else micro_steps)

    classes = {name: {"ms": 0.0, "kernels": 0.0} for name in (*CLASSES, GAPS)}
    for kernel in kernels:
        entry = classes[classify(kernel.name, kernel.phase)]
        entry["ms"] += 1e-3 * (kernel.end - kernel.start) * share(kernel.phase)
        entry["kernels"] += share(kernel.phase)
    classes[GAPS]["ms"] = sum(1e-3 * us * share(phase) for phase, us in idle(kernels).items())
    return classes


def dearest(kernels, micro_steps, step_micro_steps):
    """[{"name", "class", "ms", "kernels"}] per micro-step of each kernel name, most time first."""
    groups = defaultdict(list)
    for kernel in kernels:
        groups[classify(kernel.name, kernel.phase), kernel.name].append(kernel)
    rows = []
    for (kind, name), members in groups.items():
        total = breakdown(members, micro_steps, step_micro_steps)[kind]
        rows.append({"name": name, "class": kind, **total})
    return sorted(rows, key=lambda row: -row["ms"])
