"""The tuner's cases run on this machine, in Triton's interpreter where it has no GPU.

Their results are checked by the tests of the kernels; here a changed signature would show.
"""

import sys

import pytest
import torch

from nanofuse.bench.cases import inputs
from nanofuse.bench.cases.tiles import CASES
from nanofuse.kernels.common import tuning

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 32


@pytest.fixture
def asked(monkeypatch):
    """{op: type of its default configuration} of every op that asks for its configuration."""
    types, tuned = {}, tuning.tuned

    def note(op, default, gpu=None):
        types[op] = type(default)
        return tuned(op, default, gpu)

    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("tuned") is tuned:
            monkeypatch.setattr(module, "tuned", note)
    return types


@pytest.mark.parametrize("op", CASES)
def test_the_first_candidate_runs_and_all_are_of_its_type(op, asked):
    make, candidates = CASES[op]
    with tuning.forced(op, candidates[0]):
        case = make(ROWS, DEVICE)
        case.run()
    assert case.bytes_moved > 0 or case.flops > 0
    assert {type(candidate) for candidate in candidates} == {asked[op]}
    assert len(set(candidates)) == len(candidates)


def test_every_case_is_in_the_table():
    made = {getattr(make, "func", make) for make, _ in CASES.values()}
    assert made == {x for name, x in vars(inputs).items() if name.endswith("_case")}
