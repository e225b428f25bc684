"""Which test is the mirror of a file: the one that finds mistakes in it, by itself."""

from pathlib import Path

MIRRORS = {  # of files without a test of their name, relative to tests/
    "kernels/common/ahead": "train/test_warm",
    "kernels/common/checks": "kernels/test_strides",
    "kernels/common/fp8": "kernels/test_quantize",
    "kernels/common/jit": "test_without_triton",
    "kernels/common/lanes": "kernels/test_residual_mix",
    "kernels/common/pairs": "kernels/test_panel",
    "kernels/common/panel": "kernels/test_panel",
    "kernels/common/parts": "kernels/test_linear_residual_norm",
    "kernels/common/ptx": "kernels/test_softcap_cross_entropy",
    "kernels/common/rms_norm": "kernels/test_elementwise",
    "kernels/common/units": "kernels/test_residual_mix_tma",
    "kernels/muon_momentum": "kernels/test_muon_update",
    "kernels/relu_squared_mlp": "test_ops",
    "model/backends/base": "model/backends/test_torch_backends",
    "model/backends/flash_ahead": "train/test_warm",
    "model/backends/choice": "model/backends/test_torch_backends",
    "model/fp8/cublaslt": "model/fp8/test_tuned",
    "model/fp8/precision": "model/test_fused",
    "model/fp8/products": "model/test_fused",
    "model/fp8/weights": "model/fp8/test_operands",
    "model/generate": "model/test_engine",
    "model/option": "train/test_settings",
    "model/pieces/stream": "model/pieces/test_mix",
    "train/ahead": "train/test_warm",
    "train/assemble": "model/test_providers",
    "train/checkup": "train/test_doctor",
    "train/compare": "train/test_plot",
    "train/compiler": "train/test_warm",
    "train/compiling": "train/test_warm",
    "train/data/__main__": "train/data/test_encode",
    "train/data/library": "train/data/test_corpus",
    "train/data/token_file": "train/data/test_tokens",
    "train/errors": "test_errors",
    "train/exporting": "train/test_export",
    "train/kernel_cache": "train/test_warm",
    "train/measured": "train/test_doctor",
    "train/metrics": "train/test_plot",
    "train/nanochat": "train/test_nanochat_folders",
    "train/optim/config": "train/optim/test_optim_config",
    "train/optim/parts": "train/optim/test_sharing",
    "train/pace": "train/test_loop",
    "train/pictures": "train/test_plot",
    "train/rehearsal": "train/test_warm",
    "train/run_folder": "train/test_checkpoint",
    "train/signals": "train/test_saving",
    "train/building": "train/test_run",
    "train/start": "train/test_run",
    "train/tokenizer": "train/data/test_tokenizer",
    "train/versions": "train/test_doctor",
}


def mirror(file):
    """The test file of a file; both relative to the root."""
    path = Path(file).with_suffix("")
    path = path.with_name(path.name.removesuffix("_kernels").removesuffix("_panel"))
    name = MIRRORS.get(path.as_posix(), f"{path.parent.as_posix()}/test_{path.name}")
    return f"tests/{name}.py"
