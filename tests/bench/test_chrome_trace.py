"""bench.chrome_trace: classes of kernels by name and phase, gaps, and sums per micro-step."""

import re
from pathlib import Path

import pytest

from nanofuse.bench.chrome_trace import (
    CLASSES,
    OPTIMIZER,
    OTHER,
    Kernel,
    breakdown,
    classify,
    dearest,
    read_kernels,
)

ROOT = Path(__file__).parents[2]
NAMES = {
    "GEMM": [
        "nvjet_qqtst_128x256_128x5_2x1_v_bz_coopA_NNT",
        "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128_cublas",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...> >",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>",
    ],
    "attention": [
        "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at_",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...> > >",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_6_64x128x128",
        "triton_tem_fused_flex_attention_backward_14",
        "void pytorch_flash::flash_fwd_kernel<...>",
        "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_object_at__",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(...)",
    ],
    "cross-entropy": ["fwd_kernel", "bwd_kernel", "triton_red_fused_amax_exp_mul_tanh_backward_3"],
    "quantise": [
        "_quantize_kernel",
        "_relu_squared_kernel",
        "triton_red_fused__scaled_mm_abs_amax_mean_mul_pow_rsqrt_4",
        "triton_poi_fused__to_copy_clamp_mul_relu_9",
        "triton_poi_fused_clone_t_21",
    ],
    "norm/rotary": [
        "residual_mix_fwd_kernel",
        "residual_mix_bwd_kernel",
        "rotary_qk_norm_bwd_kernel",
        "_residual_gradients_kernel",
        "_gate_logits_fwd_kernel",
        "_gate_logits_bwd_kernel",
        "triton_per_fused_add_embedding_mean_mul_pow_rsqrt_5",
    ],
    "embedding": [
        "_embedding_grad_kernel",
        "_embed_smear_bwd_kernel",
        "_spanning_segments_kernel",
        "_bigram_rows_kernel",
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<...>",
        "triton_poi_fused_add_embedding_dense_backward_mul_2",
    ],
    OPTIMIZER: ["_momentum_kernel", "symmetric_matmul_kernel", "_adamw_scalars_kernel"],
    OTHER: ["Memset (Device)", "void at::native::vectorized_elementwise_kernel<4, ...>"],
}


@pytest.mark.parametrize("expected", NAMES)
def test_names(expected):
    assert {name: classify(name, "backward") for name in NAMES[expected]} == dict.fromkeys(
        NAMES[expected], expected
    )


def test_optimizer_phase_wins_over_the_name():
    assert classify("nvjet_hsh_128x256", "optimizer") == OPTIMIZER
    assert classify("nvjet_hsh_128x256", "forward") == "GEMM"


def test_every_kernel_of_ours_has_a_class():
    names = [
        name
        for path in (ROOT / "kernels").glob("**/*.py")
        for name in re.findall(r"^def (\w*kernel)\($", path.read_text(), re.M)
    ]
    assert len(names) > 20
    assert [name for name in names if classify(name) == OTHER] == []


def event(cat, name, ts, dur, correlation=None):
    args = {} if correlation is None else {"correlation": correlation}
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


TRACE = {
    "traceEvents": [
        {"name": "process_name", "ph": "M"},
        event("user_annotation", "forward", 0, 10),
        event("user_annotation", "optimizer", 20, 10),
        event("gpu_user_annotation", "optimizer", 0, 1000),
        event("cuda_driver", "cuLaunchKernelEx", 1, 1, 7),
        event("cuda_runtime", "cudaLaunchKernel", 21, 1, 8),
        event("kernel", "nvjet_b", 1500, 800, 8),
        event("kernel", "_quantize_kernel", 1000, 400, 7),
        event("kernel", "late", 2500, 100, 9),  # its launch is not in the trace
    ]
}


def test_phases_follow_the_launch():
    assert read_kernels(TRACE) == [
        Kernel("_quantize_kernel", 1000, 1400, "forward"),
        Kernel("nvjet_b", 1500, 2300, "optimizer"),
        Kernel("late", 2500, 2600, "optimizer"),
    ]


def test_breakdown_shares_the_optimizer_among_the_micro_steps_of_a_full_step():
    classes = breakdown(read_kernels(TRACE), micro_steps=2, step_micro_steps=8)
    assert list(classes) == [*CLASSES, "gaps"]
    assert classes["quantise"] == pytest.approx({"ms": 0.4 / 2, "kernels": 1 / 2})
    assert classes[OPTIMIZER] == pytest.approx({"ms": 0.9 / 8, "kernels": 2 / 8})
    assert classes["gaps"]["ms"] == pytest.approx(0.3 / 8)
    assert classes["GEMM"]["ms"] == 0


def test_overlap_is_no_gap():
    kernels = [
        Kernel("a", 0, 1000, "forward"),
        Kernel("b", 200, 300, "forward"),
        Kernel("c", 900, 2000, "forward"),
    ]
    assert breakdown(kernels, 1, 8)["gaps"]["ms"] == 0


def test_dearest():
    rows = dearest(read_kernels(TRACE), 2, 8)[:1]
    assert rows == [{"name": "_quantize_kernel", "class": "quantise", "ms": 0.2, "kernels": 0.5}]
