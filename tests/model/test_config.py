import pytest

from nanofuse.model.config import Dials, GPTConfig
from nanofuse.model.gpt import GPT, count_parameters
from tests.helpers import ranges, small_config


def test_d16_is_the_recipes():
    config = GPTConfig.from_depth(16)
    assert (config.n_embd, config.n_head, config.head_dim) == (1024, 8, 128)
    assert config.windows == [512, 512, 512, 2048] * 4
    assert config.table_rows == {"bigram": 163_840}
    assert config.value_embed_layers == [1, 3, 5, 7, 9, 11, 13, 15]
    assert config.num_scaling_params == 234_881_792  # 16 * 12 * 1024^2 + gates + lm_head


def test_defaults_and_bounds_move_on_purpose_only():
    assert ranges(Dials) == {
        "depth": (16, 1, 4096),
        "aspect_ratio": (64, 1, 65536),
        "head_dim": (128, 1, 65536),
        "n_kv_head": (0, 0, 65536),
        "max_seq_len": (2048, 1, 16_777_216),
        "window_pattern": ("SSSL", None, None),
        "vocab_size": (32768, 1, 1_048_576),
        "bigram_embed_factor": (5, 0, 1_048_576),
        "bigram_lambda_init": (0.05, -1000, 1000),
    }


@pytest.mark.parametrize(("depth", "width"), [(1, 128), (2, 128), (5, 384), (12, 768), (20, 1280)])
def test_width_is_rounded_up_to_whole_heads(depth, width):
    assert GPTConfig.from_depth(depth).n_embd == width


@pytest.mark.parametrize(
    ("pattern", "layers", "expected"),
    [
        ("SSSL", 4, "SSSL"),
        ("SSSL", 6, "SSSLSL"),
        ("S", 3, "SSL"),
        ("L", 2, "LL"),
        ("SL", 5, "SLSLL"),
        ("sSlL", 4, "SSLL"),
    ],
)
def test_window_pattern_is_tiled_and_the_last_layer_is_long(pattern, layers, expected):
    config = small_config(sequence_len=1024, window_pattern=pattern)
    config = GPTConfig(**{**config.to_dict(), "n_layer": layers})
    assert config.windows == [{"S": 256, "L": 1024}[letter] for letter in expected]


@pytest.mark.parametrize(
    ("length", "short"), [(2048, 512), (2049, 640), (512, 128), (256, 128), (64, 64)]
)
def test_short_window_is_a_quarter_up_to_128(length, short):
    assert small_config(sequence_len=length).windows[0] == short


@pytest.mark.parametrize("fields", [{}, {"bigram_embed_factor": 0}, {"vocab_size": 321}])
@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_counts_equal_a_built_model(fields, n_kv_head):
    config = small_config(n_kv_head=n_kv_head, **fields)
    model = GPT(config, device="meta")
    assert count_parameters(model) == config.param_counts()
    assert config.num_params == sum(p.numel() for p in model.parameters())


def test_bigram_counts_neither_for_scaling_nor_flops():
    dense, bigram = small_config(bigram_embed_factor=0), small_config(bigram_embed_factor=5)
    assert bigram.num_params > dense.num_params
    assert bigram.num_scaling_params == dense.num_scaling_params
    assert bigram.flops_per_token == dense.flops_per_token


def test_flops_per_token_of_d16():
    matmul = 6 * 234_881_792
    attention = 12 * 1024 * 4 * (3 * 512 + 2048)
    assert GPTConfig.from_depth(16).flops_per_token == matmul + attention


def test_memory_estimate_grows_with_the_batch_and_shrinks_with_fp8():
    config = GPTConfig.from_depth(16)
    small, large = config.memory_estimate(8, 2), config.memory_estimate(32, 2)
    assert small < large < 4 * small
    assert config.memory_estimate(32, 2, fp8=True) < large


def test_memory_estimate_of_fused_fp8_is_near_what_was_measured():
    """GiB of 32 x 2048 tokens on an H200 (records/2026-11-23-step), the last without the MLP's
    pre-activation; 3.9 less since logits are not stored (dev/LOG.md, 2026-11-29)."""
    for depth, measured in ((4, 10.5 - 3.9), (8, 16.9 - 3.9), (16, 40.5 - 3.9)):
        estimate = GPTConfig.from_depth(depth).memory_estimate(32, 2, True, "fused")
        assert abs(estimate / 2**30 / measured - 1) < 0.12, depth


def test_memory_estimate_of_the_compiled_model_is_near_what_was_measured():
    """GiB of 32 x 2048 tokens on an H200 (records/2026-11-28-house)."""
    for depth, fp8, measured in ((4, True, 14.5), (8, True, 20.7), (16, True, 45.4),
                                 (16, False, 52.4)):  # fmt: skip
        estimate = GPTConfig.from_depth(depth).memory_estimate(32, 2, fp8, "compile")
        assert abs(estimate / 2**30 / measured - 1) < 0.12, (depth, fp8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_kv_head": 3}, "n_kv_head 3 does not divide"),
        ({"window_pattern": "SXL"}, "window_pattern"),
        ({"window_pattern": "\u017fL"}, "window_pattern"),  # upper() would make an S of it
        ({"window_pattern": ""}, "window_pattern"),
        ({"window_pattern": "S" * 4097}, "window_pattern has more than 4,096 letters"),
        ({"bigram_embed_factor": -1}, "bigram_embed_factor"),
        ({"sequence_len": 0}, "sequence_len"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        small_config(**fields)


def test_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="head_dim 7 is odd"):
        GPTConfig.from_depth(4, 64, 7)
    with pytest.raises(ValueError, match="depth must be at least 1"):
        GPTConfig.from_depth(0)
    with pytest.raises(ValueError, match="not divisible"):
        GPTConfig(n_layer=2, n_embd=100, n_head=8, n_kv_head=8)
    with pytest.raises(ValueError, match="smear gate"):
        GPTConfig.from_depth(1, 22, 22)
    assert GPTConfig.from_depth(1, 24, 24).n_embd == 24
