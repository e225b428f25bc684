"""Hashed bigram lookup and the residual mix that opens every block.

    row_t = ((36313 * tok_t) XOR (27191 * tok_{t-1})) mod (rows - 1),   row_0 = rows - 1
    e_t   = table[row_t]
    y     = resid_lambda * x + x0_lambda * x0 + bigram_lambda * e

The last row of the table is reserved for positions without a previous token. Recipe:
karpathy/nanochat PR 747 (https://github.com/karpathy/nanochat/pull/747); hash constants as in
modded-nanogpt's bigram table.

Bytes of the mix, N = B*T positions of width D at s bytes: 4*N*D*s (x, x0, e read, y written).
FLOPs: 5 per element.
"""

import torch
import torch.nn.functional as F

HASH_CURRENT = 36313
HASH_PREVIOUS = 27191


def bigram_rows_ref(
    tokens,  # (B, T) integer
    num_rows,
    prev_token=None,  # (B,) integer: the token before tokens[:, 0], or None at the start of a row
):
    """Table row of every position, (B, T) int64 in [0, num_rows); num_rows - 1 is the reserved row.

    Raises:
        ValueError: num_rows < 2, which leaves no row to hash to.
    """
    if num_rows < 2:
        raise ValueError(f"a bigram table needs at least 2 rows, got {num_rows}")
    tokens = tokens.long()
    first = tokens.new_zeros(tokens.size(0)) if prev_token is None else prev_token.long()
    previous = torch.cat([first[:, None], tokens[:, :-1]], dim=1)  # (B, T)
    rows = torch.bitwise_xor(HASH_CURRENT * tokens, HASH_PREVIOUS * previous) % (num_rows - 1)
    if prev_token is not None:
        return rows
    reserved = rows.new_full((rows.size(0), 1), num_rows - 1)
    return torch.cat([reserved, rows[:, 1:]], dim=1)


def bigram_embedding_ref(
    tokens,  # (B, T) integer
    table,  # (rows, D)
    prev_token=None,  # (B,) integer or None
):
    """Embedding of every (previous, current) token pair, (B, T, D) in the table's dtype."""
    return F.embedding(bigram_rows_ref(tokens, table.size(0), prev_token), table)


def bigram_residual_ref(
    x,  # (B, T, D) residual stream
    x0,  # (B, T, D) stream after smear
    resid_lambda,  # ()
    x0_lambda,  # ()
    e=None,  # (B, T, D) bigram embedding; None in a dense model
    bigram_lambda=None,  # ()
):
    """Mix the stream with x0 and the bigram embedding; returns (B, T, D) in x's dtype."""
    y = resid_lambda * x + x0_lambda * x0
    if e is None:
        return y
    return y + bigram_lambda * e
