import pytest
import torch

from nanofuse.kernels.common.fp8 import E4M3
from nanofuse.kernels.transpose import transpose, transpose_ref


@pytest.mark.parametrize("rows, cols", [(16, 16), (128, 128), (130, 257), (1, 300), (384, 48)])
@pytest.mark.parametrize("dtype", [torch.uint8, E4M3])
def test_every_byte_is_at_its_place_and_no_other_is_written(rows, cols, dtype, device):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(256, (rows, cols), generator=generator, dtype=torch.uint8).to(device)
    room = torch.full((rows * cols + 2,), 77, dtype=torch.uint8, device=device)
    transpose(x.view(dtype), room[1:-1].view(cols, rows).view(dtype))
    found = room[1:-1].view(cols, rows)
    assert torch.equal(found, x.t())
    assert torch.equal(found, transpose_ref(x.view(dtype)).view(torch.uint8))
    assert room[0] == room[-1] == 77


def test_what_is_no_matrix_of_bytes_is_refused(device):
    x = torch.zeros(4, 6, dtype=torch.uint8, device=device)
    for wrong in (x.float(), x.t(), x[None]):
        with pytest.raises(ValueError, match="takes a contiguous matrix of bytes"):
            transpose(wrong, x.view(6, 4))
    with pytest.raises(ValueError, match="out"):
        transpose(x, x)
