"""The floor (least time) of a micro-step's forward and backward pass on an H200.

It is the sum of four parts, each the least work divided by a rate measured on one H200:

    products     6 N FLOPs per matrix parameter (blocks and lm_head) at 1338 TFLOP/s, the mean rate
                 of FP8 products at d16's shapes (69 ms there); in bf16 at 690 TFLOP/s
    attention    FlashAttention 4, B 32, H 8, T 2048, D 128, forward + backward: 1.256 ms with a
                 window of 512, 2.045 ms without; linear in the keys that a query sees
    elementwise  passes over N x C bf16 values per layer, at the copy bandwidth of 4.27 TB/s: 25
                 forward and 42 backward, less 8 and 12 that the MLP's GEMMs save by doing them in
                 their epilogues; backward reads the activation once more (2 in FP8, 4 in bf16).
                 That leaves 17 forward and 32 (FP8) or 34 (bf16) backward
    loss         cross-entropy and embedding gradients, 3 ms for 65,536 x 32,768 logits

The optimiser is not included. The products' rate was measured at depth 16: narrower GEMMs run
slower, so a small model cannot reach its floor.
"""

GEMM_RATES = {True: 1338e12, False: 690e12}  # FLOP/s, by FP8 or not
COPY_RATE = 4.27e12  # bytes/s, read + written
UNITS = {True: 17 + 32, False: 17 + 34}  # passes over (N, C) bf16 of a layer, by FP8 or not
LOSS_MS, LOSS_LOGITS = 3.0, 65536 * 32768
ATTENTION_SHAPE = 32 * 8 * 2048 * 128  # B * H * T * D of the two measurements
ATTENTION_MS = {512: 1.256, 2048: 2.045}  # by window


def visible_keys(window, seq_len):
    """Keys that a query sees, averaged over the positions of a row."""
    window = min(window, seq_len)
    return window - window * (window - 1) / (2 * seq_len)


def attention_ms(config, rows, window):
    """Forward and backward pass of one layer's attention over `rows` rows."""
    (short, short_ms), (full, full_ms) = ATTENTION_MS.items()
    low, high = visible_keys(short, full), visible_keys(full, full)
    per_key = (full_ms - short_ms) / (high - low)
    at_measured_shape = short_ms + per_key * (visible_keys(window, config.sequence_len) - low)
    size = rows * config.n_head * config.sequence_len * config.head_dim
    return at_measured_shape * size / ATTENTION_SHAPE


def floor_parts(config, rows, fp8=True):
    """Milliseconds of a micro-step by part, {name: ms}; `rows` rows of config.sequence_len."""
    tokens = rows * config.sequence_len
    flops = 6 * tokens * config.num_scaling_params
    unit = 2 * tokens * config.n_embd  # bytes
    return {
        "products": 1e3 * flops / GEMM_RATES[fp8],
        "attention": sum(attention_ms(config, rows, window) for window in config.windows),
        "elementwise": 1e3 * config.n_layer * UNITS[fp8] * unit / COPY_RATE,
        "loss": LOSS_MS * tokens * config.padded_vocab_size / LOSS_LOGITS,
    }


def floor_ms(config, rows, fp8=True):
    """Milliseconds of a micro-step, forward and backward."""
    return sum(floor_parts(config, rows, fp8).values())
