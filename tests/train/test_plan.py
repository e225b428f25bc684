import pytest

from nanofuse.model.config import GPTConfig
from nanofuse.train.errors import UserError
from nanofuse.train.plan import make_plan
from nanofuse.train.settings import Settings


def plan(depth=16, **fields):
    settings = Settings().replace({"depth": depth, **fields})
    return make_plan(settings, settings.model.config())


def test_d16_is_the_headline_run():
    p = plan()
    assert (p.num_iterations, p.total_batch_size, p.micro_steps) == (3584, 524_288, 8)
    assert p.lr_scale == 1.0 and p.eval_batches == 640


def test_the_bigram_table_does_not_lengthen_a_run():
    dense = make_plan(Settings(), GPTConfig.from_depth(16, bigram_embed_factor=0))
    assert dense == plan()


def test_depth_scales_decay_and_batch():
    reference = plan(depth=12)
    assert reference.weight_decay == pytest.approx(0.28) and reference.total_batch_size == 2**19
    assert plan(depth=20).weight_decay < 0.28 < plan(depth=8).weight_decay
    assert plan(depth=4).total_batch_size < 2**19 < plan(depth=26).total_batch_size


def test_horizon_by_iterations_flops_or_ratio():
    flops = GPTConfig.from_depth(16).flops_per_token * 524_288 * 100
    assert plan(target_flops=float(flops)).num_iterations == 100
    assert plan(num_iterations=7, target_flops=float(flops)).num_iterations == 7
    assert plan(target_param_data_ratio=4.0, total_batch_size=524_288).num_iterations == 1792
    # the length alone does not change decay: that follows the ratio
    assert plan(num_iterations=7).weight_decay == plan().weight_decay


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total_batch_size": 100_000}, "--total-batch-size 100000 is not a multiple"),
        ({"device_batch_size": 48}, "--total-batch-size 524288 is not a multiple"),
        ({"total_batch_size": 0}, "--total-batch-size"),
        ({"num_iterations": 0}, "--num-iterations gives 0 steps"),
        ({"target_flops": 1.0}, "--target-flops gives 0 steps"),
        ({"target_param_data_ratio": 0.0}, "--target-param-data-ratio"),
        ({"target_param_data_ratio": 1e-4}, "--target-param-data-ratio gives 0 steps"),
        ({"eval_tokens": 10}, "--eval-tokens 10"),
    ],
)
def test_bad_sizes_name_the_flag(fields, message):
    if "target_param_data_ratio" in fields:
        fields["total_batch_size"] = 524_288
    with pytest.raises(UserError, match=message):
        plan(**fields)
