"""The cases of all ops: what makes one, and the launch configurations that bench.tune tries for it.

A case is made for a number of rows (positions, or rows of all matrices together), so that the tuner
can compile candidates on a few, and for a device: on a CPU, for Triton's interpreter, all sizes are
tiny. bench.tune times those with candidates, bench.first_call calls all, the benches take the rest
of their inputs, and the bytes and FLOPs, from the same functions.
"""

import itertools
from functools import partial

from nanofuse.bench.cases import mlp, optim, stream, tables
from nanofuse.kernels.adamw import AdamWConfig
from nanofuse.kernels.common.panel import PanelTile
from nanofuse.kernels.common.tuning import Tile
from nanofuse.kernels.gradient_squares import SquaresConfig
from nanofuse.kernels.linear_relu_squared import LinearTile
from nanofuse.kernels.residual_gradients import Config
from nanofuse.kernels.residual_mix import RowTile
from nanofuse.kernels.rotary_qk_norm import HeadTile
from nanofuse.kernels.softcap_cross_entropy import LossTile
from nanofuse.kernels.symmetric_matmul import MatmulTile

WARM_ROWS = 256  # rows of a case that only has to compile a candidate


def tiles(rows, cols, warps, stages=(2,)):
    """A Tile for every combination of the given rows, cols, warps and stages."""
    return [Tile(*fields) for fields in itertools.product(rows, cols, warps, stages)]


ELEMENTWISE = tiles((32, 64), (128, 256), (4, 8)) + tiles((128,), (64, 128), (8,))
NORMS = [
    *(RowTile(32, 128, 4, stages) for stages in (1, 2, 3)),
    *(RowTile(32, 256, 8, stages) for stages in (1, 2, 3)),
    RowTile(32, 128, 8),
    RowTile(32, 256, 4),
    RowTile(32, 512, 8),
    RowTile(32, 512, 16),
    RowTile(64, 64, 4),
    RowTile(64, 64, 8),
    RowTile(64, 128, 8),
    RowTile(16, 256, 4),
]
NORMS_FORWARD = [*NORMS, RowTile(64, 64, 4, 2), RowTile(64, 128, 8, 2)]
NORMS_BACKWARD = [
    *NORMS,
    RowTile(32, 128, 4, 1, 96),
    RowTile(32, 128, 4, 1, 80),
    RowTile(32, 128, 8, 1, 64),
    RowTile(32, 256, 8, 1, 128),
    RowTile(32, 256, 8, 1, 96),
    RowTile(64, 64, 4, 1, 128),
    RowTile(64, 128, 8, 1, 128),
    RowTile(64, 128, 8, 1, 96),
]
MATMUL = [
    MatmulTile(128, 128, 64, 4, 3),
    MatmulTile(128, 128, 64, 8, 3),
    MatmulTile(128, 128, 64, 8, 4),
    MatmulTile(128, 256, 64, 8, 3),
    MatmulTile(128, 256, 64, 8, 4),
    MatmulTile(128, 128, 64, 8, 3, 1),
    MatmulTile(128, 256, 64, 8, 3, 1),
]
LINEAR = [
    *(LinearTile(128, 128, 128, 4, 3, group, programs=2) for group in (4, 8)),
    *(LinearTile(128, 128, 128, 8, 3, group, programs=2, registers=128) for group in (4, 8)),
    *(LinearTile(128, 256, 128, 8, stages) for stages in (3, 4)),
    LinearTile(256, 128, 128, 8, 3),
]
LINEAR_BF16 = [
    *(LinearTile(128, 128, 128, 4, 3, group, programs=2) for group in (4, 8, 16)),
    LinearTile(128, 128, 128, 8, 2, programs=2, registers=128),
    *(LinearTile(*shape, 128, 8, n) for shape in ((128, 256), (256, 128)) for n in (3, 4)),
    *(LinearTile(128, 256, 128, 8, 4, group) for group in (4, 16)),
]
LOGITS = [
    *(LinearTile(128, 128, 128, 4, 3, group, 2) for group in (4, 8, 16)),
    *(LinearTile(128, 128, 128, 8, 3, group, 2, 128) for group in (8, 16)),
    LinearTile(128, 128, 64, 4, 4, 8, 2),
    LinearTile(64, 128, 128, 4, 2, 16, 3, 128),
    LinearTile(64, 128, 64, 4, 3, 16, 4, 128),
    LinearTile(128, 64, 128, 4, 2, 16, 4, 128),
    LinearTile(64, 256, 128, 4, 2, 16, 2),
    LinearTile(256, 128, 128, 8, 3),
]
PANELS = [PanelTile(warps, stages) for warps in (4, 8) for stages in (3, 4, 6, 8)]
LOGITS_BF16 = [
    *(LinearTile(128, 128, 128, 4, 3, group, 2) for group in (8, 16)),
    LinearTile(128, 128, 128, 8, 2, 16, 2, 128),
    *(LinearTile(128, 256, 128, 8, stages) for stages in (3, 4)),
    LinearTile(128, 256, 128, 8, 4, 16),
    LinearTile(256, 128, 128, 8, 3),
]
HEAD_TILES = [
    HeadTile(rows, heads, 4, stages)
    for rows, heads, stages in itertools.product((16, 32), (4, 8), (1, 2, 3))
]
HEAD_TILES_BWD = HEAD_TILES[6:] + [
    HeadTile(64, heads, 8, stages) for heads in (4, 8) for stages in (1, 2)
]
CASES = {  # name in tuned.json: (function of rows and device, candidates)
    "quantize": (stream.quantize_case, ELEMENTWISE),
    "transpose": (stream.transpose_case, ELEMENTWISE),
    "residual_mix_fwd": (stream.residual_mix_fwd_case, NORMS_FORWARD),
    "residual_norm_fwd": (stream.residual_norm_fwd_case, NORMS_FORWARD),
    "residual_mix_bwd": (partial(stream.residual_bwd_case, opening=True), NORMS_BACKWARD),
    "residual_norm_bwd": (partial(stream.residual_bwd_case, opening=False), NORMS_BACKWARD),
    "residual_gradients": (
        stream.residual_gradients_case,
        [
            Config(positions, 16, registers)
            for positions in (4, 8, 16, 32)
            for registers in (None, 168, 128)
        ],
    ),
    "resid_lambda_grad": (
        stream.resid_lambda_grad_case,
        tiles((128,), (128,), (4, 8), (2, 3, 4)) + tiles((128,), (256,), (8,), (2, 3)),
    ),
    "embed_smear": (stream.embed_smear_case, tiles((1, 2, 4), (0,), (2, 4))),
    "relu_squared": (mlp.relu_squared_case, ELEMENTWISE),
    "relu_squared_bwd": (mlp.relu_squared_bwd_case, ELEMENTWISE),
    "linear_relu_squared": (mlp.linear_relu_squared_case, LINEAR),
    "linear_relu_squared_bwd": (mlp.linear_relu_squared_bwd_case, LINEAR),
    "linear_relu_squared_panel": (mlp.linear_relu_squared_case, PANELS),
    "linear_relu_squared_panel_bwd": (mlp.linear_relu_squared_bwd_case, PANELS),
    "linear_relu_squared_bf16": (mlp.linear_relu_squared_bf16_case, LINEAR_BF16),
    "linear_relu_squared_bwd_bf16": (mlp.linear_relu_squared_bwd_bf16_case, LINEAR_BF16),
    "linear_rotary_qk_norm": (stream.linear_rotary_qk_norm_case, PANELS),
    "linear_residual_norm": (stream.linear_residual_norm_case, PANELS),
    "rotary_qk_norm": (stream.rotary_qk_norm_case, HEAD_TILES),
    "rotary_qk_norm_bwd": (stream.rotary_qk_norm_bwd_case, HEAD_TILES_BWD),
    "rotary_qk_norm_bwd_sums": (stream.rotary_qk_norm_bwd_sums_case, HEAD_TILES_BWD),
    "softcap_cross_entropy_fwd": (
        mlp.softcap_cross_entropy_fwd_case,
        tiles((1,), (2048, 4096, 8192), (4, 8)) + tiles((1,), (16384,), (16,)),
    ),
    "softcap_cross_entropy_bwd": (
        mlp.softcap_cross_entropy_bwd_case,
        [
            LossTile(rows, cols, blocks, 256, warps, registers)
            for rows, cols, blocks, warps, registers in (
                (32, 128, 8, 8, None),
                (32, 128, 8, 8, 80),
                (32, 128, 32, 8, None),
                (32, 128, 2, 8, None),
                (32, 128, 8, 4, None),
                (32, 256, 8, 8, None),
                (64, 64, 8, 8, None),
                (64, 128, 8, 8, None),
            )
        ],
    ),
    "linear_softcap_cross_entropy": (partial(mlp.linear_softcap_case, fp8=True), LOGITS),
    "linear_softcap_cross_entropy_panel": (partial(mlp.linear_softcap_case, fp8=True), PANELS),
    "linear_softcap_cross_entropy_bf16": (partial(mlp.linear_softcap_case, fp8=False), LOGITS_BF16),
    "linear_softcap_cross_entropy_rows": (
        partial(mlp.linear_softcap_case, fp8=True),
        tiles((64, 128, 256), (16, 32, 64), (4, 8)),
    ),
    "linear_softcap_cross_entropy_weighted": (
        partial(mlp.weighted_rows_case, fp8=True),
        tiles((16, 32, 64), (256, 512), (4, 8)),
    ),
    "linear_softcap_cross_entropy_dx": (
        partial(mlp.linear_softcap_dx_case, fp8=True),
        tiles((8, 16, 32), (256, 512), (4, 8)),
    ),
    "embedding_grad": (
        tables.embedding_grad_case,
        tiles((16, 32, 64), (256,), (1,)) + tiles((16, 32), (512,), (2,)),
    ),
    "embedding_grad_spans": (
        tables.embedding_grad_case,
        tiles((8, 16, 32, 64), (128,), (1, 2, 4)) + tiles((16, 32), (256,), (2, 4)),
    ),
    "gradient_squares": (
        optim.gradient_squares_case,
        [
            SquaresConfig(block, warps)
            for block, warps in ((8192, 4), (16384, 4), (16384, 8), (32768, 8), (65536, 8))
        ],
    ),
    "adamw": (
        optim.adamw_case,
        [
            AdamWConfig(block, warps)
            for block, warps in ((4096, 4), (8192, 4), (8192, 8), (16384, 8))
        ],
    ),
    "muon_momentum": (optim.muon_momentum_case, tiles((1024,), (4096,), (4, 8, 16))),
    "muon_apply": (optim.muon_apply_case, ELEMENTWISE),
    "symmetric_matmul": (optim.symmetric_matmul_case, MATMUL),
    "symmetric_matmul_transposed": (optim.symmetric_matmul_transposed_case, MATMUL),
    "newton_schulz_unit_rows": (
        optim.unit_rows_case,
        tiles((1,), (2048, 4096, 8192), (2, 4, 8)),
    ),
    "newton_schulz_rescale": (
        optim.rescale_case,
        tiles((1,), (4096, 8192, 16384), (4, 8)),
    ),
    "batched_matmul": (optim.batched_matmul_case, MATMUL + [MatmulTile(256, 128, 64, 8, 4)]),
    # without launch configurations of their own
    "bigram_rows": (tables.bigram_rows_case, ()),
    "gate_logits": (stream.gate_logits_case, ()),
    "gate_logits_bwd": (stream.gate_logits_bwd_case, ()),
}
TUNED = {op: candidates for op, (_, candidates) in CASES.items() if candidates}
