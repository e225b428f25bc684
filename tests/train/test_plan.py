import pytest

from nanofuse.model.config import GPTConfig
from nanofuse.train.errors import UserError
from nanofuse.train.plan import make_plan, make_resumed_plan
from nanofuse.train.settings import Settings


def plan(depth=16, **fields):
    settings = Settings().replace({"depth": depth, **fields})
    return make_plan(settings, settings.model.config())


def test_d16_is_the_headline_run():
    p = plan()
    assert (p.num_iterations, p.total_batch_size, p.micro_steps) == (3584, 524_288, 8)
    assert p.lr_scale == 1.0 and p.eval_rows == 640 * 32


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


def resumed(step=4, **fields):
    saved = Settings().replace({"depth": 4, "num_iterations": 8, "device_batch_size": 2})
    settings = saved.replace(fields)
    return make_resumed_plan(settings, saved, saved.model.config(), step, 8)


def test_a_resumed_run_keeps_its_batch_and_may_get_longer():
    """The batch of -1 follows from the device batch too, and must not move with it."""
    saved = Settings().replace({"depth": 4, "num_iterations": 8})
    assert resumed().num_iterations == 8 and resumed(num_iterations=16).num_iterations == 16
    total = make_plan(saved, saved.model.config()).total_batch_size
    assert resumed(device_batch_size=4).total_batch_size == total
    assert resumed(device_batch_size=4).micro_steps * 2 == resumed().micro_steps
    assert resumed(num_iterations=6).num_iterations == 6


def test_nothing_left_to_do_is_said():
    with pytest.raises(UserError, match="--num-iterations 3 ends at step 3, .* at step 4"):
        resumed(num_iterations=3)
    with pytest.raises(UserError, match="finished its 8 steps; raise --num-iterations"):
        resumed(step=8)
    assert resumed(step=8, num_iterations=9).num_iterations == 9


def test_an_evaluation_may_be_all_that_is_left():
    saved = Settings().replace({"depth": 4, "num_iterations": 8})
    config = saved.model.config()
    assert make_resumed_plan(saved, saved, config, 8, 8, evaluated=False).num_iterations == 8
    shorter = saved.replace({"num_iterations": 7})
    with pytest.raises(UserError, match="at step 8"):
        make_resumed_plan(shorter, saved, config, 8, 8, evaluated=False)


def test_a_length_without_end_is_refused():
    with pytest.raises(UserError, match=r"--target-flops gives .* steps"):
        plan(target_flops=1e40)
