"""Operands and scales follow the weights, whoever changes them and in whatever order."""

import pytest
import torch

from nanofuse.kernels.common.fp8 import E4M3, FP8Operand
from nanofuse.model.fp8.operands import Operands
from nanofuse.model.fp8.products import PlainGemm, TorchGemm
from nanofuse.model.fp8.scaling import CALIBRATED_STEPS, DelayedScaling, Unscaled
from nanofuse.model.fp8.weights import Weights
from nanofuse.model.fused import FusedGPT, fused_pieces
from tests.helpers import random_model
from tests.model.test_fused import DEVICE, FEW, batch, make

SCALINGS = [Unscaled, DelayedScaling]


def make_operands(scaling=DelayedScaling, seed=0, **fields):
    """A small GPT's weights and their operands, made."""
    config = make(**{"depth": 1, "aspect": 8, "vocab_size": 64, **fields})
    model = random_model(config, torch.float32, seed, DEVICE)
    weights = Weights(fused_pieces(model), model.dtype)
    names = weights.fp8_names() | {"an activation": E4M3}
    arguments = () if scaling is Unscaled else (names, DEVICE)
    operands = Operands(weights, scaling(*arguments))
    operands.follow()
    return model, operands


def values(operands):
    """What the products take, and the scales, as integers of their bits."""
    found = []
    for weight in operands.weights.all():
        x = weight.operand
        found += [x.data, x.transposed, x.inverse_scale] if isinstance(x, FP8Operand) else [x]
    found += operands.scaling.state_dict().values()
    return [x.clone().view(torch.uint8) for x in found]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def change(model, factor=2.0):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)


def take_step(model, operands, factor=0.9, peak=1.0):
    """A training pass that records maxima of at least `peak`, and an optimiser's step."""
    operands.follow()
    operands.recorded = True
    if isinstance(operands.scaling, DelayedScaling):
        operands.scaling.amax.clamp_min_(peak)  # kernels only raise them
    change(model, factor)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", ["c_q", "c_k", "c_v", "c_proj", "c_fc", "lm_head"])
@pytest.mark.parametrize("fields", [{}, {"n_kv_head": 1, "aspect": 16}], ids=str)
def test_a_change_of_any_matrix_is_followed(scaling, name, fields):
    model, operands = make_operands(scaling, **fields)
    before = values(operands)
    matrix = next(p for key, p in model.named_parameters() if f".{name}." in f".{key}")
    with torch.no_grad():
        matrix.mul_(2)
    operands.follow()
    after = values(operands)
    assert not same(before, after)
    twin, expected = make_operands(scaling, seed=1, **fields)
    twin.load_state_dict(model.state_dict())
    expected.load_state_dict({})
    expected.follow()
    assert same(after, values(expected))


def test_nothing_is_made_anew_without_a_change():
    _, operands = make_operands()
    for weight in operands.weights.all():
        weight.operand.data.zero_()
    operands.follow()
    assert not any(weight.operand.data.float().any() for weight in operands.weights.all())


@pytest.mark.parametrize("scaling", SCALINGS)
def test_operands_stay_where_graphs_read_them(scaling):
    model, operands = make_operands(scaling)

    def addresses():
        found = [weight.operand for weight in operands.weights.all()]
        found = [x.data if isinstance(x, FP8Operand) else x for x in found]
        return [x.data_ptr() for x in found] + [x.data_ptr() for x in scales.values()]

    scales = operands.scaling.state_dict()
    before = addresses()
    take_step(model, operands)
    operands.follow()
    operands.load_state_dict({})
    operands.follow()
    assert addresses() == before


def test_a_step_moves_the_maxima_into_the_history_and_another_change_does_not():
    model, operands = make_operands()
    scaling = operands.scaling
    take_step(model, operands, peak=7.0)
    operands.follow()
    assert operands.steps == 1 and (scaling.history[0] == 7.0).all()
    assert (scaling.amax[:, 0] < 7.0).all()  # those of the new operands alone
    change(model)
    operands.follow()
    assert operands.steps == 1 and not scaling.history[1:].any()


def test_maxima_of_weights_that_were_replaced_are_forgotten():
    model, operands = make_operands()
    largest = operands.scaling.amax.clone()
    change(model, 0.5)
    operands.follow()
    assert torch.equal(operands.scaling.amax[:, 0], largest[:, 0] / 2)


def test_maxima_of_a_step_left_out_stay_out():
    model, operands = make_operands()
    operands.taken = torch.ones(1, device=DEVICE)
    take_step(model, operands, peak=3.0)
    operands.follow()
    operands.taken.zero_()
    take_step(model, operands, 1.0, peak=float("inf"))
    operands.follow()
    history = operands.scaling.history
    assert (history[0] == 3.0).all() and not history[1:].any() and operands.steps == 2


def test_scales_are_calibrated_in_the_first_steps():
    model, operands = make_operands()
    found = []
    for _ in range(CALIBRATED_STEPS + 3):
        found.append((operands.scaling.calibrating, operands.settled))
        take_step(model, operands)
        operands.follow()
    assert found == [(True, False)] * CALIBRATED_STEPS + [(False, True)] * 3
    assert make_operands(Unscaled)[1].settled


@pytest.mark.parametrize("steps", [1, CALIBRATED_STEPS + 1])
@pytest.mark.parametrize("order", ["weights first", "scales first", "scales used before"])
def test_a_state_is_loaded_in_any_order(order, steps):
    model, operands = make_operands()
    for step in range(steps):
        take_step(model, operands, 0.9, 2.0 + step)
    state = {name: x.clone() for name, x in operands.state_dict().items()}
    assert state["updates"] == steps + 1
    twin, again = make_operands(seed=1)
    take_step(twin, again, 5.0, 100.0)  # it has trained on something else before
    again.follow()
    if order == "weights first":
        twin.load_state_dict(model.state_dict())
        again.follow()  # with scales of its own
    again.load_state_dict(state)
    if order == "scales used before":
        again.recorded = True
        again.load_state_dict(state)
    if order != "weights first":
        twin.load_state_dict(model.state_dict())
    again.follow()
    assert again.steps == steps and same(values(operands), values(again))
    for one in ((model, operands), (twin, again)):
        take_step(*one)
        one[1].follow()
    assert same(values(operands), values(again))
    assert torch.equal(operands.scaling.amax, again.scaling.amax)


def scales_of_0_1():
    """Of the same tensors and one more, the gradient of the logits, after six steps."""
    count = make_operands()[1].scaling.count + 1
    shapes = DelayedScaling.shapes(count)
    return {n: torch.rand(s) for n, s in shapes.items()} | {"updates": torch.tensor(7)}


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("tensors", [dict, scales_of_0_1], ids=["none", "0.1"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_without_scales_of_ours_everything_starts_anew(scaling, tensors, weights_first):
    """As of a checkpoint of another backend, or of a version that had other tensors in FP8."""
    model, operands = make_operands(scaling, seed=1)
    twin, again = make_operands(scaling)
    take_step(twin, again, 5.0, 100.0)
    again.follow()
    if weights_first:
        twin.load_state_dict(model.state_dict())
        again.follow()
    again.recorded = True
    again.load_state_dict(tensors())
    if not weights_first:
        twin.load_state_dict(model.state_dict())
    again.follow()
    assert again.steps == 0 and same(values(operands), values(again))


def test_damaged_scales_are_refused_and_nothing_changes():
    model, operands = make_operands()
    take_step(model, operands)
    state = {name: x.clone() for name, x in operands.state_dict().items()}
    before = values(operands)
    for name in state:
        for damaged in (None, state[name][..., None]):
            tensors = {n: x for n, x in (state | {name: damaged}).items() if x is not None}
            with pytest.raises(ValueError, match=f"scale '{name}' is missing or of another"):
                operands.load_state_dict(tensors)
    assert same(before, values(operands)) and operands.steps == 1


@pytest.mark.parametrize("gemm", [PlainGemm, TorchGemm])
def test_evaluation_and_training_take_the_weights_of_now(gemm):
    """The pass itself asks, in both modes."""
    config = make(depth=1, aspect=16, vocab_size=128)
    dtype = torch.float32
    fused = FusedGPT(random_model(config, dtype, device=DEVICE), gemm()).train()
    data = batch(config, FEW)
    fused(*data).backward()
    assert fused.operands.recorded
    other = random_model(config, dtype, seed=1, device=DEVICE)
    fused.model.load_state_dict(other.state_dict())
    fresh = FusedGPT(other, gemm())
    with torch.no_grad():
        assert torch.equal(fused.eval()(*data), fresh.eval()(*data))
    assert fused.operands.steps == 1
    fused.operands.load_state_dict({})
    assert torch.equal(fused.train()(*data), fresh.train()(*data))
