"""Products whose algorithm was chosen by measurement: providers `nvmath` and `off-nvmath`.

cuBLASLt's own first choice, which Transformer Engine and torch take, is 3 to 24 % slower than the
best of its list at the shapes of depths 8 and 16 (H200). `prepare`, called once before the first
step, measures the list against the other library, Transformer Engine or torch, and takes what is
fastest; the choice is kept for the next process. A shape that was not prepared gets the first
choice. Weight gradients, which accumulate in fp32, are the other library's.
"""

import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch

from nanofuse.kernels.common.fp8 import E4M3, E5M2, FP8Operand
from nanofuse.kernels.common.store import Store, user_folder
from nanofuse.kernels.common.tuning import gpu_name
from nanofuse.model.fp8.cublaslt import ALIGNMENT, CublasLt, Product
from nanofuse.model.fp8.products import Gemm, PlainGemm, TorchGemm, TransformerEngineGemm
from nanofuse.model.fp8.winners import Winners
from nanofuse.model.providers import message_line

FILE = "products.json"
ROUNDS = 16
SAMPLE = 1e-3  # seconds of GPU time that a sample should take
MOST_CALLS = 20  # in a sample
RANDOM = 1 << 20  # elements that are drawn; a larger matrix repeats them


def graph_seconds(calls):
    """Median seconds of each call on the GPU, without launch gaps: CUDA graphs, in turns."""
    stream, pool, graphs = torch.cuda.Stream(), torch.cuda.graph_pool_handle(), []

    def timed(run):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()  # whatever is loaded at the first call
        once = min(timed(call) for call in calls)
        repeats = min(max(round(SAMPLE / once), 1), MOST_CALLS)
        for call in calls:
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            for _ in range(repeats):
                call()
            graph.capture_end()
            graphs.append(graph)
        times = [[] for _ in calls]
        pairs = list(zip(graphs, times, strict=True))
        for _ in range(ROUNDS):
            for graph, taken in pairs:
                taken.append(timed(graph.replay))
            pairs.reverse()  # nobody always comes first, or after the same one
    torch.cuda.current_stream().wait_stream(stream)
    return [statistics.median(taken) / repeats for taken in times]


def random_matrix(rows, cols, dtype, device):
    """(rows, cols) of normal values that repeat; without an fp32 matrix of that size."""
    size = rows * cols * dtype.itemsize
    generator = torch.Generator(device).manual_seed(0)  # and torch's own stays as it is
    drawn = torch.randn(RANDOM, generator=generator, device=device).to(dtype).view(torch.uint8)
    return drawn.repeat(-(-size // drawn.numel()))[:size].view(dtype).view(rows, cols)


def random_operand(rows, cols, dtype, fp8, device):
    """An operand (rows, cols): bf16, or in FP8 one whose layouts hold the same values in another
    order, which no time depends on, and no comparison of libraries."""
    data = random_matrix(rows, cols, dtype if fp8 else torch.bfloat16, device)
    if not fp8:
        return data
    return FP8Operand(data, data.view(cols, rows), torch.ones(1, device=device))


def random_operands(shape, fp8, device="cuda"):
    """What a provider's method for a Shape takes: (x, w), (g, w) or (g, x)."""
    x, g = (shape.positions, shape.k, E4M3), (shape.positions, shape.n, E5M2)
    w = shape.n, shape.k, E4M3
    pair = {"forward": (x, w), "input_grad": (g, w), "weight_grad": (g, x)}[shape.kind]
    return [random_operand(*each, fp8, device) for each in pair]


@dataclass(frozen=True)
class Beside:
    """The library beside nvmath: name of its record, version, provider, and in words why it is not
    a better one."""

    name: str
    version: str
    gemm: Gemm
    why: str = ""


def fp8_beside():
    """Of FP8 products Transformer Engine, or torch where that does not load."""
    try:
        made = TransformerEngineGemm()
    except Exception as error:  # a broken install may raise anything
        why = f" (te: {message_line(error)})"
        return Beside("torch", torch.__version__, TorchGemm(), why)
    import transformer_engine

    return Beside("te", getattr(transformer_engine, "__version__", "unknown"), made)


def plain_beside():
    """Of products in bf16 torch."""
    return Beside("torch", torch.__version__, PlainGemm())


class NvmathGemm:
    """FP8 products by cuBLASLt, tuned. Constructing one raises whatever the import raises.

    Args:
        store: where choices are kept; the user's file by default.
    """

    fp8, linear, device = True, None, "cuda"

    def __init__(self, store=None):
        self.library = CublasLt()
        self.beside = self._beside()
        self.other_name, self.other = self.beside.name, self.beside.gemm
        if store is None:
            section = (
                f"{gpu_name()}, {self.library.version}, {self.other_name} {self.beside.version}"
            )
            store = Store(user_folder() / FILE, section)
        self.winners = Winners(self.library, graph_seconds, store)
        self._plans = {}  # Product: Plan, or None: the other library

    _beside = staticmethod(fp8_beside)

    def prepare(self, shapes, say=print):
        """Choose for the products to come, by measurement where no earlier process did.

        Args:
            shapes: model.fp8.shapes.Shape of each.
            say: called with a line before the measurement.

        Returns:
            a line that says what was chosen.
        """
        chosen, tuned, started = {}, {}, time.perf_counter()
        wanted = {self._product(shape): shape for shape in shapes}
        for product in wanted:
            chosen[product] = self.winners.recall(product)
        missing = [product for product, winner in chosen.items() if winner is None]
        if missing:
            say(f"products: measuring algorithms for {len(missing)} shapes, once on this machine")
        for product in missing:
            tuned[product] = self._tune(product, wanted[product])
        chosen |= tuned
        self._plans |= {product: winner.plan for product, winner in chosen.items()}
        by_other = sum(self.chosen(shape) != "nvmath" for shape in wanted.values())
        line = f"products: {len(chosen) - by_other} of {len(chosen)} shapes by nvmath"
        line += f", {by_other} by {self.other_name}" if by_other else ""
        line += f", weight gradients by {self.other_name}{self.beside.why}; "
        path = self.winners.store.path
        if not tuned:
            return line + f"as in {path}"
        torch.cuda.empty_cache()  # of the operands, the largest of which are the logits
        why = self.winners.keep(tuned)
        line += f"{len(tuned)} measured in {time.perf_counter() - started:.1f} s, "
        return line + (f"not kept ({why})" if why else f"kept in {path}")

    def chosen(self, shape):
        """Name of the library that computes a Shape: nvmath, or the other one."""
        beaten = self._plans.get(self._product(shape), "") is None
        return self.other_name if beaten or shape.kind == "weight_grad" else "nvmath"

    def _product(self, shape):
        """The Product of a Shape."""
        forward = shape.kind == "forward"
        cols, depth = (shape.n, shape.k) if forward else (shape.k, shape.n)
        x, w = ("e4m3" if forward else "e5m2", "e4m3") if self.fp8 else ("bf16", "bf16")
        return Product(shape.positions, cols, depth, x, w, forward or self.fp8)

    def _tune(self, product, shape):
        """The Winner of a product, measured on random operands."""
        x, w = random_operands(shape, self.fp8, self.device)
        a, b, _, scales = self._views(shape.kind, x, w)
        other = partial(getattr(self.other, shape.kind), x, w)
        return self.winners.tune(product, lambda plan: self.library.run(plan, a, b, scales), other)

    def _views(self, kind, x, w):
        """What cuBLASLt reads of two FP8Operands: x, w in the layout that is contiguous along the
        reduction, True for that, and the inverse scales."""
        w_data = w.data if kind == "forward" else w.transposed
        return x.data, w_data, True, (x.inverse_scale, w.inverse_scale)

    def _multiply(self, kind, x, w):
        a, b, transposed, scales = self._views(kind, x, w)
        product = Product.of(a, b, transposed)
        if product not in self._plans:
            self._plans[product] = self.library.candidates(product, 1)[0]
        plan = self._plans[product]
        odd = (a.data_ptr() | b.data_ptr()) % ALIGNMENT or not a.is_contiguous()
        if plan is None or odd:
            return getattr(self.other, kind)(x, w)
        return self.library.run(plan, a, b, scales)

    def forward(
        self,
        x,  # FP8Operand (M, K)
        w,  # FP8Operand (N, K)
    ):
        return self._multiply("forward", x, w)

    def input_grad(
        self,
        g,  # FP8Operand (M, N)
        w,  # FP8Operand (N, K)
    ):
        return self._multiply("input_grad", g, w)

    def weight_grad(
        self,
        g,  # FP8Operand (M, N)
        x,  # FP8Operand (M, K), as returned by `keep`
        out,  # (N, K) fp32, added to
    ):
        self.other.weight_grad(g, x, out)

    def keep(
        self,
        x,  # FP8Operand (M, K)
    ):
        """The part of x that weight_grad reads, to be saved for the backward pass."""
        return self.other.keep(x)


class NvmathPlainGemm(NvmathGemm):
    """As NvmathGemm, of bf16 tensors, beside torch."""

    fp8 = False
    _beside = staticmethod(plain_beside)

    def _views(
        self,
        kind,
        x,  # (M, K) or (M, N)
        w,  # (N, K)
    ):
        return x, w, kind == "forward", None
