"""The digests repeat, and see a single bit."""

import torch

from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.optim.muon_adamw import MuonAdamW
from tests.digests import digest, make_config, make_model, train


def eager(config, change=None):
    model = make_model(config, torch.float32)
    if change is not None:
        change(model)
    optimizer = MuonAdamW(model.param_roles(), OptimConfig(), config.n_embd, lr_scale=0.5)
    return train("eager", model, model, optimizer, steps=1)


def test_digests_repeat_and_cover_every_parameter():
    config = make_config(depth=2)
    found = eager(config)
    assert found == eager(config)
    for name, _ in make_model(config, torch.float32).named_parameters():
        assert f"eager/step0/grad/{name}" in found and f"eager/weights/{name}" in found


def test_one_bit_of_one_weight_shows():
    def change(model):
        with torch.no_grad():
            model.lm_head.weight.view(torch.int32)[0, 0] ^= 1

    config = make_config(depth=2)
    assert (
        eager(config)["eager/weights/lm_head.weight"]
        != (eager(config, change)["eager/weights/lm_head.weight"])
    )
    assert digest(torch.tensor(0.0)) != digest(torch.tensor(-0.0))
