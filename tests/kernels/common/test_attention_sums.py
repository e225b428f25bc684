import pytest
import torch

from nanofuse.kernels.common.attention_sums import TILE_COLS, TILE_ROWS, AttentionSums


def by_fragments(
    tile,  # (64, 128)
):
    """The tile as two warpgroups store their fragments of wgmma.m64n64, by the PTX ISA: element by
    element, in a loop."""
    flat = torch.empty(TILE_ROWS * TILE_COLS)
    for group in range(2):
        for thread in range(128):
            warp, lane = divmod(thread, 32)
            for register in range(32):
                row = 16 * warp + lane // 4 + 8 * (register // 2 % 2)
                col = 64 * group + 8 * (register // 4) + 2 * (lane % 4) + register % 2
                # 16 bytes of every thread of the warpgroup, then the next 16
                at = 4096 * group + 512 * (register // 4) + 4 * thread + register % 4
                flat[at] = tile[row, col]
    return flat


def test_the_order_is_that_of_two_warpgroups_fragments():
    x = torch.arange(2 * 128 * 3 * 128, dtype=torch.float32).view(2, 128, 3, 128)
    sums = AttentionSums.of(x)
    assert sums.shape == x.shape and sums.sums.shape == (2, 3, 128 * 128)
    for batch, head, tile in ((0, 0, 0), (0, 2, 1), (1, 1, 0)):
        flat = sums.sums[batch, head].view(2, -1)[tile]
        assert torch.equal(flat, by_fragments(x[batch, 64 * tile : 64 * (tile + 1), head]))
    assert torch.equal(sums.rows(), x) and sums.rows().is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_products_rounded_once(dtype):
    x = torch.randn(1, 64, 1, 128)
    sums = AttentionSums.of(x, 0.3, dtype)
    assert torch.equal(sums.sums.sort().values, x.flatten().sort().values.view(1, 1, -1))
    assert torch.equal(sums.rows(), (x * 0.3).to(dtype))
