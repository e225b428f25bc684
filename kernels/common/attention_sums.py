"""The gradient of q as FlashAttention 4's backward pass for Hopper sums it, before its conversion.

Its kernel adds up dq in fp32, without the softmax's scale, in tiles of 64 positions x 128 columns
of a head, one after the other. Two warpgroups own 64 columns each, and store their accumulators of
the instruction wgmma.m64n64 thread by thread, 16 bytes at once. Within a tile, from the slowest to
the fastest running index, with sizes:

    column half 2, columns 8, warp 4, row 8, column pair 4, row half 2, column 2
    row = 16 warp + 8 row half + row,   column = 64 half + 8 columns + 2 pair + column

so that 16 bytes are rows r and r + 8 of two columns. The library's own conversion multiplies the
sums by the scale and rounds them; `rows` does the same, to the bit, in plain PyTorch.

Sources: flash_attn/cute/flash_bwd_sm90.py and flash_bwd_postprocess.py of flash-attn-4 4.0.0b36;
accumulator fragments of wgmma: the PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

from dataclasses import dataclass

import torch

from nanofuse.kernels.common.jit import tl, triton

TILE_ROWS = 64
TILE_COLS = 128  # the head size
_WITHIN = (2, 8, 4, 8, 4, 2, 2)  # sizes, as above
_TO_ROWS = (2, 5, 3, 0, 1, 4, 6)  # the same indices as they make up rows and columns
_TO_TILE = tuple(_TO_ROWS.index(i) for i in range(7))


@dataclass(frozen=True)
class AttentionSums:
    """A gradient of q, (B, T, H, 128), T a multiple of 64, in the order above.

    Fields: sums (B, H, T*128) fp32, contiguous; factor, a float that they lack; dtype, to which
    their products with it are rounded.
    """

    sums: torch.Tensor  # (B, H, T*128) fp32
    factor: float
    dtype: torch.dtype

    @property
    def shape(self):
        """(B, T, H, 128)."""
        batch, heads, size = self.sums.shape
        return torch.Size((batch, size // TILE_COLS, heads, TILE_COLS))

    def rows(self):
        """The gradient, (B, T, H, 128), contiguous."""
        batch, seq_len, heads, size = self.shape
        x = self.sums.view(batch, heads, seq_len // TILE_ROWS, *_WITHIN)
        x = x.permute(0, 1, 2, *(3 + i for i in _TO_ROWS)).reshape(batch, heads, seq_len, size)
        return (x * self.factor).to(self.dtype).transpose(1, 2).contiguous()

    @classmethod
    def of(
        cls,
        x,  # (B, T, H, 128)
        factor=1.0,
        dtype=None,
    ):
        """Sums whose `rows` are x * factor in `dtype`, by default x's."""
        batch, seq_len, heads, size = x.shape
        sizes = [_WITHIN[i] for i in _TO_ROWS]
        tiles = x.float().transpose(1, 2).reshape(batch, heads, seq_len // TILE_ROWS, *sizes)
        tiles = tiles.permute(0, 1, 2, *(3 + i for i in _TO_TILE))
        return cls(tiles.reshape(batch, heads, seq_len * size), factor, dtype or x.dtype)


@triton.jit
def load_sums(
    sums_ptr,  # (B, H, T*128) fp32
    batch,  # int64
    head,
    heads,
    first,  # position, a multiple of ROWS
    T,
    half: tl.constexpr,  # 0 or 1, of a head's columns
    ROWS: tl.constexpr,  # 16, 32 or 64
):
    """(ROWS, 64) fp32: half a head's columns of positions first..first+ROWS-1."""
    tile = ((batch * heads + head) * T + first // 64 * 64) * 128 + half * 4096
    j, k = tl.arange(0, 8), tl.arange(0, 8 * ROWS)
    # four rows before the upper two of a row's four pairs: in shared memory, which keeps the order
    # of this block, they then lie in different banks
    k = k // 64 * 64 + k // 8 % 4 * 16 + k // 32 % 2 * 8 + k % 8
    x = tl.load(sums_ptr + tile + first % 64 * 8 + (j[:, None] * 512 + k[None, :]))
    # of columns 8, warp, row 2 and 4, pair 2 and 2, row half 2, column 2
    x = x.reshape(8, ROWS // 16, 2, 2, 4, 2, 2, 2).permute(1, 6, 2, 4, 0, 3, 5, 7)
    return x.reshape(ROWS, 64)
