"""Products whose algorithm was chosen by measurement: providers `nvmath` and `off-nvmath`.

cuBLASLt's own first choice, which Transformer Engine and torch take, is 3 to 24 % slower than the
best of its list at the shapes of depths 8 and 16 (H200). `prepare`, called once before the first
step, measures the list, that first choice and torch, and takes what is fastest; the choice is kept
for the next process. A shape that was not prepared gets the first of the list. Transformer Engine,
whose import takes seconds, is not needed: it has no algorithms of its own.
"""

import statistics
import time
from functools import cache, partial

import torch

from nanofuse.kernels.common.fp8 import E4M3, E5M2, FP8Operand
from nanofuse.kernels.common.store import PRODUCTS, Store, user_folder
from nanofuse.kernels.common.tuning import gpu_name
from nanofuse.model.fp8.cublaslt import ALIGNMENT, DTYPES, CublasLt, Product
from nanofuse.model.fp8.products import PlainGemm, TorchGemm
from nanofuse.model.fp8.winners import Winners

ROUNDS = 16
SAMPLE = 1e-3  # seconds of GPU time that a sample should take
MOST_CALLS = 20  # in a sample
RANDOM = 1 << 20  # elements that are drawn; a larger matrix repeats them


@cache
def _measuring_stream(device):
    """The one stream of a GPU's measurements: torch keeps a workspace of cuBLAS for each."""
    return torch.cuda.Stream(device)


def graph_seconds(calls, rounds=ROUNDS):
    """Median seconds of each call on the GPU, without launch gaps: CUDA graphs, in turns."""
    stream = _measuring_stream(torch.cuda.current_device())
    pool, graphs = torch.cuda.graph_pool_handle(), []

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
        for _ in range(rounds):
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


def format_of(shape, gradients):
    """FP8 dtype of the gradient in a Shape, where the layers' are in `gradients`."""
    return E5M2 if shape.weight == "lm_head" else gradients


def random_operands(shape, fp8, device="cuda", gradients=E5M2):
    """What a provider's method for a Shape takes: (x, w), (g, w) or (g, x)."""
    x = shape.positions, shape.k, E4M3
    g = shape.positions, shape.n, format_of(shape, gradients)
    w = shape.n, shape.k, E4M3
    pair = {"forward": (x, w), "input_grad": (g, w), "weight_grad": (g, x)}[shape.kind]
    return [random_operand(*each, fp8, device) for each in pair]


def fits(
    x,  # a matrix
):
    """Whether cuBLASLt may read or write it by a Plan: without gaps, at an aligned address."""
    return x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0


class NvmathGemm:
    """FP8 products by cuBLASLt, tuned. Constructing one raises whatever the import raises.

    Args:
        store: where choices are kept; the user's file by default.
    """

    fp8, linear, device, gradients = True, None, "cuda", E5M2
    other_of = TorchGemm  # what computes where torch is faster, and what cuBLASLt does not take

    def __init__(self, store=None):
        self.library, self.other = CublasLt(), self.other_of()
        if store is None:
            section = f"{gpu_name()}, {self.library.version}, torch {torch.__version__}"
            store = Store(user_folder() / PRODUCTS, section)
        self.winners = Winners(self.library, graph_seconds, store)
        self._plans = {}  # Product: Plan, or None: torch

    def prepare(self, shapes, say=print, choices=None):
        """Choose for the products to come, by measurement where no earlier process did.

        Args:
            shapes: model.fp8.shapes.Shape of each.
            say: called with a line before the measurement.
            choices: another process's, taken before those that are kept here.

        Returns:
            a line that says what was chosen.
        """
        chosen, tuned, started = {}, {}, time.perf_counter()
        if choices:
            self.winners.learn(choices)
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
        self.choices = self.winners.told(chosen)
        by_torch = sum(winner.plan is None for winner in chosen.values())
        line = f"products: {len(chosen) - by_torch} of {len(chosen)} shapes by nvmath"
        line += f", {by_torch} by torch; " if by_torch else "; "
        path = self.winners.store.path
        if not tuned:
            return line + f"as in {path}"
        torch.cuda.empty_cache()  # of the operands, the largest of which are the logits
        why = self.winners.keep(tuned)
        line += f"{len(tuned)} measured in {time.perf_counter() - started:.1f} s, "
        return line + (f"not kept ({why})" if why else f"kept in {path}")

    def chosen(self, shape):
        """Name of the library that computes a Shape: nvmath or torch."""
        return "torch" if self._plans.get(self._product(shape), "") is None else "nvmath"

    def _product(self, shape):
        """The Product of a Shape."""
        m, n, k = shape.positions, shape.n, shape.k
        of_grad = DTYPES[format_of(shape, self.gradients)]
        x, w = ("e4m3" if shape.kind == "forward" else of_grad, "e4m3")
        if not self.fp8:
            x = w = "bf16"
        rows, cols, depth = {
            "forward": (m, n, k),
            "input_grad": (m, k, n),
            "weight_grad": (n, k, m),
        }[shape.kind]
        return Product(rows, cols, depth, x, w, self._layout(shape.kind), shape.adds)

    def _tune(self, product, shape):
        """The Winner of a product, measured on random operands."""
        x, w = random_operands(shape, self.fp8, self.device, self.gradients)
        a, b, scales = self._views(shape.kind, x, w)
        other = partial(getattr(self.other, shape.kind), x, w)
        if not shape.adds:
            return self.winners.tune(
                product, lambda plan: self.library.run(plan, a, b, scales), other
            )
        out = torch.zeros(shape.n, shape.k, device=self.device)

        def added(call):
            out.zero_()
            call()
            return out

        return self.winners.tune(
            product,
            lambda plan: self.library.run(plan, a, b, scales, out),
            partial(other, out),
            added,
        )

    def _layout(self, kind):
        """As of a Product: Hopper multiplies FP8 where both operands are contiguous along the
        reduction."""
        return "TN"

    def _views(self, kind, x, w):
        """What cuBLASLt reads of two FP8Operands: of each the layout that is contiguous along the
        reduction, and the inverse scales."""
        scales = x.inverse_scale, w.inverse_scale
        if kind == "weight_grad":
            return x.transposed, w.transposed, scales
        return x.data, w.data if kind == "forward" else w.transposed, scales

    def _multiply(self, kind, x, w, *out):
        a, b, scales = self._views(kind, x, w)
        product = Product.of(a, b, self._layout(kind), bool(out))
        if product not in self._plans:
            self._plans[product] = self.library.candidates(product, 1)[0]
        plan = self._plans[product]
        if plan is None or not all(fits(tensor) for tensor in (a, b, *out)):
            return getattr(self.other, kind)(x, w, *out)
        return self.library.run(plan, a, b, scales, *out)

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
        self._multiply("weight_grad", g, x, out)

    def keep(
        self,
        x,  # FP8Operand (M, K)
    ):
        """The part of x that weight_grad reads, to be saved for the backward pass."""
        return self.other.keep(x)


class NvmathPlainGemm(NvmathGemm):
    """As NvmathGemm, of bf16 tensors."""

    fp8, other_of = False, PlainGemm

    def _layout(self, kind):
        return {"forward": "TN", "input_grad": "NN", "weight_grad": "NT"}[kind]

    def _views(
        self,
        kind,
        x,  # (M, K) or (M, N)
        w,  # (N, K), or x of a weight gradient (M, K)
    ):
        return x, w, None
