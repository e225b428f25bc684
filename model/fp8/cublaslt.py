"""Matrix products by cuBLASLt, called through nvmath-python's bindings: the algorithms that it has
for a product, and one of them run (https://docs.nvidia.com/cuda/cublas, "Using the cuBLASLt API").

cuBLASLt's matrices are column-major. A row-major matrix is its own transpose there, so that what is
computed is out.T = w.T x.T: w is the first operand. The result of a call depends on the algorithm
alone, so the same one gives the same bits, by whichever library it is called.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanofuse.kernels.common.fp8 import E4M3, E5M2

DTYPES = {torch.bfloat16: "bf16", E4M3: "e4m3", E5M2: "e5m2"}
CANDIDATES = 16  # algorithms that cuBLASLt is asked for, best guess first
WORKSPACE = 32 << 20  # bytes, as Transformer Engine's on Hopper
ALIGNMENT = 256  # bytes: what cuBLASLt assumes of addresses unless told otherwise
ALGORITHM_BYTES = 64  # of a cublasLtMatmulAlgo_t


@dataclass(frozen=True)
class Product:
    """What an algorithm is chosen for: out (rows, cols) = x times w, which sums over depth. All
    row-major and contiguous, without an epilogue.

    `layout` in cuBLAS's words, of w and then of x: w is stored (cols, depth) with "T", (depth,
    cols) with "N"; x (rows, depth) with "N", (depth, rows) with "T". out is bf16, and FP8
    accumulates fast; or, if it `adds`, fp32 and added to, and FP8 accumulates in fp32 registers.
    """

    rows: int
    cols: int
    depth: int
    x: str  # of DTYPES
    w: str  # of DTYPES
    layout: str
    adds: bool = False

    @classmethod
    def of(
        cls,
        x,  # (rows, depth) or (depth, rows)
        w,  # (cols, depth) or (depth, cols)
        layout,
        adds=False,
    ):
        rows, depth = x.shape if layout[1] == "N" else reversed(x.shape)
        cols = w.size(0 if layout[0] == "T" else 1)
        return cls(rows, cols, depth, DTYPES[x.dtype], DTYPES[w.dtype], layout, adds)

    def __str__(self):
        out = "fp32" if self.adds else "bf16"
        size = f"{self.rows}x{self.cols}x{self.depth}"
        return f"{size} {self.x} {self.w} {out} {self.layout} beta {int(self.adds)}"


@dataclass(frozen=True)
class Plan:
    """A product with an algorithm, ready to run. The numbers are cuBLASLt's handles."""

    product: Product
    operation: int
    layouts: tuple[int, int, int]  # of w, x and out
    algorithm: Any  # NumPy array that holds a cublasLtMatmulAlgo_t

    @property
    def text(self):
        """The algorithm as text, for the same version of cuBLASLt in another process."""
        return self.algorithm.tobytes().hex()


class CublasLt:
    """cuBLASLt on the current GPU, for calls in one stream at a time: they share a workspace, whose
    address CUDA graphs hold. Constructing one raises whatever nvmath's import raises.
    """

    def __init__(self):
        import nvmath
        from nvmath.bindings import cublas, cublasLt

        types = nvmath.CudaDataType
        self._lt, self._result = cublasLt, cublasLt.matmul_heuristic_result_dtype
        self._types = {
            "fp32": types.CUDA_R_32F,
            "bf16": types.CUDA_R_16BF,
            "e4m3": types.CUDA_R_8F_E4M3,
            "e5m2": types.CUDA_R_8F_E5M2,
        }
        self._fp32 = cublas.ComputeType.COMPUTE_32F, types.CUDA_R_32F
        self._transpose = cublas.Operation.T
        self._workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
        self._one = torch.ones(1, device="cuda")  # a scale, for planning
        self._handle = cublasLt.create()  # in the context that torch has made by now
        self._factors = np.array([1, 0], dtype=np.float32)  # alpha, and beta: one of them
        self._described = {}  # Product: operation and layouts
        self.version = f"cuBLASLt {cublasLt.get_version()}, nvmath {nvmath.__version__}"

    def _set(self, setter, owner, attribute, value, dtype):
        buffer = np.array([value], dtype=dtype)
        setter(owner, attribute, buffer.ctypes.data, buffer.nbytes)

    def _describe(self, product):
        """cuBLASLt's handles of a Product: operation, and layouts of w, x and out."""
        if product in self._described:
            return self._described[product]
        lt, attributes = self._lt, self._lt.MatmulDescAttribute
        operation = lt.matmul_desc_create(*self._fp32)

        def put(attribute, value):
            dtype = lt.get_matmul_desc_attribute_dtype(attribute)
            self._set(lt.matmul_desc_set_attribute, operation, attribute, value, dtype)

        if product.layout[0] == "T":
            put(attributes.TRANSA, self._transpose)
        if product.layout[1] == "T":
            put(attributes.TRANSB, self._transpose)
        if product.w != "bf16":
            put(attributes.FAST_ACCUM, int(not product.adds))
            self._point(operation, self._one, self._one)
        rows, cols, depth = product.rows, product.cols, product.depth
        of_w = (depth, cols) if product.layout[0] == "T" else (cols, depth)  # column-major
        of_x = (depth, rows) if product.layout[1] == "N" else (rows, depth)
        of_out, out = (cols, rows), "fp32" if product.adds else "bf16"
        layouts = tuple(
            lt.matrix_layout_create(self._types[dtype], *size, size[0])
            for dtype, size in ((product.w, of_w), (product.x, of_x), (out, of_out))
        )
        self._described[product] = operation, layouts
        return self._described[product]

    def _point(
        self,
        operation,
        w_scale,  # (1,) fp32
        x_scale,  # (1,) fp32
    ):
        """Let an operation read the two inverse scales from the device."""
        attributes = self._lt.MatmulDescAttribute
        for name, scale in (("A_SCALE_POINTER", w_scale), ("B_SCALE_POINTER", x_scale)):
            setter = self._lt.matmul_desc_set_attribute
            self._set(setter, operation, attributes[name], scale.data_ptr(), np.int64)

    def _plans(self, product, count, reductions):
        """Up to `count` Plans of a Product, cuBLASLt's best guess first.

        Args:
            reductions: mask of the ways in which partial sums over depth may be added.

        Raises:
            RuntimeError: it has none.
        """
        lt, preferences = self._lt, self._lt.MatmulPreferenceAttribute
        operation, (w, x, out) = self._describe(product)
        preference = lt.matmul_preference_create()
        try:
            setter = lt.matmul_preference_set_attribute
            size, scheme = preferences.MAX_WORKSPACE_BYTES, preferences.REDUCTION_SCHEME_MASK
            self._set(setter, preference, size, WORKSPACE, np.uint64)
            self._set(setter, preference, scheme, reductions, np.uint32)
            results, found = np.zeros(count, self._result), np.zeros(1, np.int32)
            lt.matmul_algo_get_heuristic(
                self._handle, operation, w, x, out, out, preference, count,
                results.ctypes.data, found.ctypes.data,
            )  # fmt: skip
        finally:
            lt.matmul_preference_destroy(preference)
        results = results[: found[0]]
        usable = results["algo"][results["state"] == 0]
        if not len(usable):
            raise RuntimeError(f"cuBLASLt has no algorithm for {product}")
        algorithms = (usable[i : i + 1].copy() for i in range(len(usable)))
        return [Plan(product, operation, (w, x, out), algorithm) for algorithm in algorithms]

    def first(self, product):
        """The Plan that Transformer Engine's call of cuBLASLt runs: the best guess, with the same
        workspace and any reduction.

        Raises:
            RuntimeError: there is none.
        """
        return self._plans(product, 1, self._lt.ReductionScheme.MASK)[0]

    def candidates(self, product, count=CANDIDATES):
        """Plans of a Product, cuBLASLt's best guess first. Partial sums over depth, if any, lie in
        the workspace in fp32 and are added in one order: each gives the same bits every time.

        Raises:
            RuntimeError: it has none.
        """
        return self._plans(product, count, self._lt.ReductionScheme.COMPUTE_TYPE)

    def restore(self, product, text):
        """The Plan of a Product with an algorithm as Plan.text gave it; None if it does not fit."""
        try:
            stored = bytes.fromhex(text)
        except (TypeError, ValueError):
            return None
        if len(stored) != ALGORITHM_BYTES:
            return None
        operation, layouts = self._describe(product)
        algorithm = np.frombuffer(stored, dtype=np.uint64).copy()
        result = np.zeros(1, self._result)
        try:
            self._lt.matmul_algo_check(
                self._handle, operation, *layouts, layouts[2], algorithm.ctypes.data,
                result.ctypes.data,
            )  # fmt: skip
        except self._lt.cuBLASLtError:
            return None
        fits = result["state"][0] == 0 and result["workspace_size"][0] <= WORKSPACE
        return Plan(product, operation, layouts, algorithm) if fits else None

    def run(
        self,
        plan,
        x,  # (rows, depth) or (depth, rows)
        w,  # (cols, depth) or (depth, cols)
        scales=None,  # inverse scales of x and w, (1,) fp32 each, in FP8
        out=None,  # (rows, cols) fp32, if the product adds
    ):
        """The product (rows, cols), in the current stream: new in bf16, or added to `out`."""
        product, (of_w, of_x, of_out) = plan.product, plan.layouts
        if not product.adds:
            out = torch.empty(product.rows, product.cols, dtype=torch.bfloat16, device=x.device)
        if scales is not None:
            self._point(plan.operation, scales[1], scales[0])
        one, zero = self._factors.ctypes.data, self._factors[1:].ctypes.data
        self._lt.matmul(
            self._handle, plan.operation, one, w.data_ptr(), of_w, x.data_ptr(), of_x,
            one if product.adds else zero, out.data_ptr(), of_out, out.data_ptr(), of_out,
            plan.algorithm.ctypes.data, self._workspace.data_ptr(), WORKSPACE,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        return out
