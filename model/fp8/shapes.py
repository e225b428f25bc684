"""The matrix products of a training pass, as a list: what a provider may tune before the first."""

from dataclasses import dataclass

from nanofuse.kernels import linear_residual_norm, linear_rotary_qk_norm

KINDS = ("forward", "input_grad", "weight_grad")
# those of kernels/linear_relu_squared.py and linear_softcap_cross_entropy.py; a provider does all
# others, but for those `in_one` names
IN_KERNELS = {("fc", "forward"), ("mlp_proj", "input_grad"), ("lm_head", "forward")}


@dataclass(frozen=True)
class Shape:
    """One product of `positions` rows, for the weight (n, k) of a kind of linear layer."""

    weight: str  # qkv, attn_proj, fc, mlp_proj, lm_head
    kind: str  # of KINDS
    positions: int
    n: int
    k: int

    @property
    def by_provider(self):
        """Whether a provider computes it, and no kernel of ours, but for those of `in_one`."""
        return (self.weight, self.kind) not in IN_KERNELS

    @property
    def adds(self):
        """Whether it is added to what is there, in fp32."""
        return self.kind == "weight_grad"

    @property
    def flops(self):
        return 2 * self.positions * self.n * self.k


def product_shapes(config, positions):
    """Every Shape of the fused pass: three kinds of five weights.

    Args:
        config: GPTConfig.
        positions: rows times tokens of a micro-step.
    """
    width = config.n_embd
    weights = {
        "qkv": (width + 2 * config.kv_dim, width),
        "attn_proj": (width, width),
        "fc": (4 * width, width),
        "mlp_proj": (width, 4 * width),
        "lm_head": (config.padded_vocab_size, width),
    }
    return [Shape(name, kind, positions, *w) for name, w in weights.items() for kind in KINDS]


def in_one(shape, head_dim, device):
    """Name of the op that computes an FP8 product on this device together with what follows it, for
    a model in bf16 with heads of this size; None where a provider computes it, or kernels do in any
    case."""
    sizes = device, shape.positions, shape.n, shape.k
    if (shape.weight, shape.kind) == ("qkv", "forward"):
        return linear_rotary_qk_norm.OP if linear_rotary_qk_norm.fits(*sizes, head_dim) else None
    if (shape.weight, shape.kind) == ("attn_proj", "forward"):
        return linear_residual_norm.OP if linear_residual_norm.fits(*sizes) else None
    return None


def for_provider(config, positions, device, fp8):
    """The Shapes that a provider computes in a training pass, in FP8 or not."""
    shapes = [shape for shape in product_shapes(config, positions) if shape.by_provider]
    return [x for x in shapes if not (fp8 and in_one(x, config.head_dim, device))]
