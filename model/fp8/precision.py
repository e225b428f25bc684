"""How the matrix products of one pass are computed: by whom, and under which scales."""

from dataclasses import dataclass
from typing import Any

from nanofuse.kernels.common.fp8 import Scaling
from nanofuse.kernels.quantize import quantize
from nanofuse.model.fp8.scaling import DelayedScaling, Unscaled


@dataclass(frozen=True)
class Precision:
    """Fields: gemm, a provider of model.fp8.products; scaling, the scales of its FP8 operands;
    norm_scaling, the static Scaling of normalised activations, None without FP8.
    """

    gemm: Any
    scaling: DelayedScaling | Unscaled
    norm_scaling: Scaling | None = None

    def weight(self, weight):
        """What the products of a forward pass take of a LinearWeight."""
        return weight.operand if self.gemm.fp8 else weight.plain()

    def operand(
        self,
        name,
        x,  # (N, C)
    ):
        """Operand of a tensor that no kernel of ours made: quantised under the scale `name`, or as
        it is."""
        return self.scaling.produce(
            name, lambda scaling: x if scaling is None else quantize(x, scaling)
        )
