"""Row of the bigram embedding table for every position: a hash of its token and the one before.

    row_t = ((36313 * tok_t) XOR (27191 * tok_{t-1})) mod (rows - 1),   row_0 = rows - 1

The table's last row is reserved for positions without a previous token. Recipe:
karpathy/nanochat PR 747 (https://github.com/karpathy/nanochat/pull/747); hash constants as in
modded-nanogpt's bigram table. Bytes: one token read, one row written per position.
"""

import torch
import torch.nn.functional as F

from nanofuse.kernels.common.jit import tl, triton

HASH_CURRENT = 36313
HASH_PREVIOUS = 27191
BLOCK = 1024


def bigram_rows_ref(
    tokens,  # (B, T) integer
    num_rows,
):
    """Table row of every position, (B, T) int64 in [0, num_rows); num_rows - 1 is the reserved row.

    Raises:
        ValueError: num_rows < 2: beside the reserved row there is none to hash to.
    """
    if num_rows < 2:
        raise ValueError(f"a bigram table needs at least 2 rows, got {num_rows}")
    tokens = tokens.long()
    current, previous = tokens[:, 1:], tokens[:, :-1]
    rows = torch.bitwise_xor(HASH_CURRENT * current, HASH_PREVIOUS * previous) % (num_rows - 1)
    reserved = tokens.new_full((tokens.size(0), 1), num_rows - 1)
    return torch.cat([reserved, rows], dim=1)


def bigram_embedding_ref(
    tokens,  # (B, T) integer
    table,  # (rows, D)
):
    """Embedding of every (previous, current) token pair, (B, T, D) in the table's dtype."""
    return F.embedding(bigram_rows_ref(tokens, table.size(0)), table)


@triton.jit
def _bigram_rows_kernel(
    tokens_ptr,  # (N,) integer
    rows_ptr,  # (N,) int32
    N,
    T,
    num_rows,
    CURRENT: tl.constexpr,
    PREVIOUS: tl.constexpr,
    BM: tl.constexpr,
):
    position = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = position < N
    first = position % T == 0
    token = tl.load(tokens_ptr + position, mask=ok, other=0).to(tl.int64)
    previous = tl.load(tokens_ptr + position - 1, mask=ok & ~first, other=0).to(tl.int64)
    row = ((CURRENT * token) ^ (PREVIOUS * previous)) % (num_rows - 1)
    row += tl.where(row < 0, num_rows - 1, 0)  # of a negative token: the remainder has its sign
    row = tl.where(first, num_rows - 1, row)
    tl.store(rows_ptr + position, row.to(tl.int32), mask=ok)


def bigram_rows(
    tokens,  # (B, T) integer, contiguous
    num_rows,
):
    """Table row of every position, (B, T) int32: bigram_rows_ref in a kernel.

    The rows are in [0, num_rows) for every token, negative ones included.

    Raises:
        ValueError: num_rows < 2, or tokens are not contiguous.
    """
    if num_rows < 2:
        raise ValueError(f"a bigram table needs at least 2 rows, got {num_rows}")
    if not tokens.is_contiguous():
        raise ValueError("bigram_rows takes contiguous tokens; call .contiguous() on them")
    rows = torch.empty(tokens.shape, dtype=torch.int32, device=tokens.device)
    n = tokens.numel()
    _bigram_rows_kernel[(triton.cdiv(n, BLOCK),)](
        tokens, rows, n, tokens.size(1), num_rows, HASH_CURRENT, HASH_PREVIOUS, BM=BLOCK
    )
    return rows
