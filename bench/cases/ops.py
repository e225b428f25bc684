"""The ops, for docs/ops.md: a formula each, where truth, test and bench are, and its timed calls.

A name ends in one of kernels/*.py. Formulas are short: the docstrings have all of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """One timed call of an op: its names in the tables of bench, now and in older records, and in
    tuned.json."""

    what: str
    names: tuple[str, ...] = ()
    tuned: str = ""


@dataclass(frozen=True)
class Op:
    """An op of kernels/<name>.py."""

    name: str
    formula: str
    calls: tuple[Call, ...] = ()
    truth: str = ""  # the reference; "": <name>_ref
    test: str = ""  # file; "": tests/kernels/test_<name>.py
    bench: str = ""  # what the bench is named after; "": the op, "-": there is none


def passes(name, forward="[forward]", backward="[backward]"):
    """Calls of both passes of an op that has a configuration for each."""
    return Call("forward", (name + forward,), name), Call(
        "backward", (name + backward,), f"{name}_bwd"
    )


STACKS = ("(64, 1024, 1024)", "(16, 4096, 1024)", "(16, 1024, 4096)")

OPS = (
    Op(
        "embed_smear",
        "n = norm(wte[token]); y_t = n_t + λ·sigmoid(W·n_t)·n_{t−1}",
        (
            Call("forward", ("embed_smear",)),
            Call("backward", ("embed_smear_backward",)),
            Call("both", (), "embed_smear"),
        ),
    ),
    Op(
        "bigram_rows",
        "row_t = (36313·tok_t xor 27191·tok_{t−1}) mod (rows − 1)",
        (Call("rows", ("bigram_rows",)),),
        bench="embedding_grad",
    ),
    Op(
        "residual_mix",
        "y = λ·(x + branch) + λ₀·x0 + Σ λ_k·e_k; norm(y)",
        (
            Call("forward, opens a block", ("block_opening",), "residual_mix_fwd"),
            Call("forward, in its middle", ("middle_norm",), "residual_norm_fwd"),
            Call("backward, opens a block", ("block_opening_backward",), "residual_mix_bwd"),
            Call("backward, in its middle", ("middle_norm_backward",), "residual_norm_bwd"),
        ),
    ),
    Op("backout", "y = x − λ·x_mid, by residual_mix", bench="-"),
    Op(
        "residual_gradients",
        "grad x0 = Σ_l λ₀_l·g_l; grad λ₀_l = Σ g_l·x0; the same of tables",
        (Call("all layers", ("residual_gradients",), "residual_gradients"),),
        bench="residual_mix",
    ),
    Op(
        "resid_lambda_grad",
        "Σ g·(x + a·wᵀ)",
        (
            Call("ordinary lambda", ("resid_lambda_grad[ordinary]",)),
            Call("small lambda", ("resid_lambda_grad[small]",), "resid_lambda_grad"),
        ),
    ),
    Op(
        "gate_logits",
        "logit_k = Σ_{c<12} norm(y)_c·w_kc",
        (
            Call("forward", ("gate_logits[forward]",)),
            Call("backward", ("gate_logits[backward]",)),
        ),
    ),
    Op(
        "rotary_qk_norm",
        "q, k ← 1.2·norm(rotary(·)); v ← v + 3·sigmoid(gate)·value embedding",
        (
            Call("forward, plain", ("rotary_qk_norm[plain]",)),
            Call("forward, with values", ("rotary_qk_norm[value]",), "rotary_qk_norm"),
            Call("backward, plain", ("rotary_qk_norm_bwd[plain]",)),
            Call("backward, with values", ("rotary_qk_norm_bwd[value]",), "rotary_qk_norm_bwd"),
            Call(
                "backward of attention's sums, with values",
                ("rotary_qk_norm_bwd_sums[value]",),
                "rotary_qk_norm_bwd_sums",
            ),
        ),
    ),
    Op(
        "linear_rotary_qk_norm",
        "q, k, v of x·wᵀ, as rotary_qk_norm makes them",
        (
            Call("forward, plain", ("linear_rotary_qk_norm[plain]",)),
            Call(
                "forward, with values", ("linear_rotary_qk_norm[value]",), "linear_rotary_qk_norm"
            ),
        ),
    ),
    Op(
        "linear_residual_norm",
        "y = x + a·wᵀ, and norm(y)",
        (Call("forward", ("linear_residual_norm",), "linear_residual_norm"),),
    ),
    Op(
        "quantize",
        "q = fp8(clamp(x·scale)), row-major and transposed",
        (
            Call("of width C", ("quantize[C]", "quantize[(65536, 1024)]"), "quantize"),
            Call("of width 4C", ("quantize[4C]", "quantize[(65536, 4096)]")),
        ),
    ),
    Op("transpose", "out_nm = x_mn, of bytes", (Call("of width C", ("transpose",), "transpose"),)),
    Op("relu_squared", "y = max(x, 0)²", passes("relu_squared")),
    Op(
        "linear_relu_squared",
        "y = max(x·wᵀ, 0)²; backward 2·√y·(dz·v)",
        (
            *passes("linear_relu_squared"),
            Call("forward, in Gluon", (), "linear_relu_squared_panel"),
            Call("backward, in Gluon", (), "linear_relu_squared_panel_bwd"),
            Call(
                "forward, bf16",
                ("linear_relu_squared_bf16[forward]",),
                "linear_relu_squared_bf16",
            ),
            Call(
                "backward, bf16",
                ("linear_relu_squared_bf16[backward]",),
                "linear_relu_squared_bwd_bf16",
            ),
        ),
    ),
    Op("relu_squared_mlp", "z = max(x·upᵀ, 0)²·downᵀ", test="tests/test_ops.py", bench="-"),
    Op(
        "softcap_cross_entropy",
        "z = 15·tanh(logits / 15); loss = logsumexp(z) − z[target]",
        (
            Call("losses", ("losses",), "softcap_cross_entropy_fwd"),
            Call("losses and gradient, bf16", ("bf16_gradient",)),
            Call("losses and gradient, FP8", ("fp8_gradient",)),
            Call("gradient, FP8", (), "softcap_cross_entropy_bwd"),
        ),
    ),
    Op(
        "linear_softcap_cross_entropy",
        "losses, and u = e·(1 − z²/15²) with e = exp(z − 15) for the gradient, of x·wᵀ",
        (
            Call("FP8", ("linear_softcap_cross_entropy[1024]",), "linear_softcap_cross_entropy"),
            Call("FP8, in Gluon", (), "linear_softcap_cross_entropy_panel"),
            Call(
                "bf16",
                ("linear_softcap_cross_entropy_bf16[1024]",),
                "linear_softcap_cross_entropy_bf16",
            ),
            Call("all, by the tile of its rows", (), "linear_softcap_cross_entropy_rows"),
            Call(
                "weighted_rows, FP8",
                ("linear_softcap_cross_entropy_rows[weighted_rows]",),
                "linear_softcap_cross_entropy_weighted",
            ),
            Call(
                "dx, FP8",
                ("linear_softcap_cross_entropy_rows[dx]",),
                "linear_softcap_cross_entropy_dx",
            ),
            Call("dw, FP8", ("linear_softcap_cross_entropy_rows[dw]",)),
        ),
    ),
    Op(
        "embedding_grad",
        "table_grad[r] += Σ of grad_rows[n] with index n = r",
        (
            Call("tokens, bf16 table", ("token_table[zipf-torch.bfloat16]",), "embedding_grad"),
            Call("tokens, fp32 table", ("token_table[zipf-torch.float32]",)),
            Call("bigrams, bf16 table", ("bigram_table[torch.bfloat16]",)),
            Call("spans of blocks", (), "embedding_grad_spans"),
            Call("sort of the rows", ("sort_rows",)),
        ),
    ),
    Op(
        "gradient_squares",
        "s_t = Σ g_t²",
        (Call("all gradients", ("gradient_squares",), "gradient_squares"),),
    ),
    Op(
        "adamw",
        "p ← p·(1 − lr·wd) − lr·m̂ / (√v̂ + ε)",
        (Call("tables and lm_head", ("adamw",)), Call("eight bf16 tensors", (), "adamw")),
    ),
    Op(
        "muon_momentum",
        "m ← lerp(m, g, 1 − μ); z = rows of lerp(g, m, μ), of unit length",
        (Call("one stack", (), "muon_momentum"),),
        truth="muon_update_ref",
        test="tests/kernels/test_muon_update.py",
        bench="muon_update",
    ),
    Op(
        "muon_update",
        "u = newton_schulz(g) by NorMuon's variance; p ← p − lr·u − lr·wd·p·[u·p ≥ 0]",
        (
            *(Call(f"passes, {shape}", (f"muon_passes[{shape}]",)) for shape in STACKS),
            *(Call(f"all, {shape}", (f"muon_update[{shape}]",)) for shape in STACKS),
            Call("muon_apply", (), "muon_apply"),
        ),
    ),
    Op(
        "newton_schulz",
        "five times: A = X·Xᵀ, X ← aX + (bA + cA²)·X",
        (
            *(Call(shape, (f"newton_schulz[[{shape}]]",)) for shape in STACKS),
            Call("unit_rows", (), "newton_schulz_unit_rows"),
            Call("rescale", (), "newton_schulz_rescale"),
        ),
    ),
    Op(
        "symmetric_matmul",
        "Y = f·L·Rᵀ + β·D + d·I, of which half is computed; L·R",
        (
            Call("square", ("symmetric_matmul[square]",), "symmetric_matmul"),
            Call("XᵀX", ("symmetric_matmul[transposed]",), "symmetric_matmul_transposed"),
            Call("batched_matmul", ("batched_matmul",), "batched_matmul"),
        ),
    ),
)
