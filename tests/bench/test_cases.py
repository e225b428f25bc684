"""The cases of the ops run on this machine, in Triton's interpreter where it has no GPU.

Their results are checked by the tests of the kernels; here a changed signature would show.
"""

import re
import sys
from pathlib import Path

import pytest
import torch

from nanofuse.bench.cases.case import TINY, Case, nbytes
from nanofuse.bench.cases.tiles import CASES, TUNED
from nanofuse.kernels.common import tuning
from nanofuse.kernels.common.panel import BM, PanelTile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 32
ROOT = Path(__file__).parents[2]


@pytest.fixture
def asked(monkeypatch):
    """{op: type of its default configuration} of every op that asks for its configuration."""
    types, tuned = {}, tuning.tuned

    def note(op, default, cols=None, gpu=None):
        types[op] = type(default)
        return tuned(op, default, cols, gpu)

    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("tuned") is tuned:
            monkeypatch.setattr(module, "tuned", note)
    return types


@pytest.mark.parametrize("op", TUNED)
def test_the_first_candidate_runs_and_all_are_of_its_type(op, asked):
    make, candidates = CASES[op]
    on_panel = isinstance(candidates[0], PanelTile)
    if on_panel and tuning.capability(DEVICE) != (9, 0):
        pytest.skip("a kernel for Hopper alone")
    with tuning.forced(op, candidates[0]):
        case = make(BM if on_panel else ROWS, DEVICE)
        case.run()
    assert case.bytes_moved > 0
    assert {type(candidate) for candidate in candidates} == {asked[op]}
    assert len(set(candidates)) == len(candidates)


@pytest.mark.parametrize("op", [op for op in CASES if op not in TUNED])
def test_what_is_not_tuned_runs(op, asked):
    case = CASES[op][0](ROWS, DEVICE)
    case.run()
    assert case.bytes_moved > 0 and op not in asked


def test_every_configuration_that_an_op_asks_for_has_candidates():
    """Each literal name in a call of `tuned` is in the table."""
    found = set()
    for path in ROOT.glob("kernels/*.py"):
        found |= set(re.findall(r"\btuned\(\s*\"(\w+)\"", path.read_text()))
    assert found and found <= TUNED.keys()


def test_what_is_counted():
    x = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert nbytes(x, None, [x, (7, x.float())]) == 30 + 30 + 7 + 60
    case = Case(lambda: x.float(), x.shape, x, flops=1.0)
    assert case.bytes_moved == 30 + 60
    in_place = Case(lambda: x.mul_(2), x.shape, x, x, returns_new=False)
    assert in_place.bytes_moved == 60


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UNITS = {  # bytes of a call over rows * width, by the formulas in the docstrings of the ops
    "quantize": 2 + 2,
    "transpose": 1 + 1,
    "residual_norm_fwd": 2 * 2 + 2 + 2,
    "residual_norm_bwd": 3 * 2 + 2 + 2,
    "residual_mix_bwd": 3 * 2 + 2 + 2,
    "relu_squared": 4 * (2 + 2),
    "relu_squared_bwd": 4 * (4 + 2),
    "rotary_qk_norm": 2 * 3 * 2,
    "softcap_cross_entropy_fwd": 2,
    "softcap_cross_entropy_bwd": 2 + 2,
    "adamw": 8 * 8 * 2,
    "muon_momentum": 18,
    "muon_apply": 12,
}


@pytest.mark.cpu
@pytest.mark.parametrize("op", UNITS)
def test_the_count_is_that_of_the_docstrings(op):
    """Above it are numbers per row and rows of tables, at these sizes up to an eighth, and nothing
    is below."""
    rows = 4 * TINY.width  # a whole matrix
    exact = UNITS[op] * rows * TINY.width
    assert TINY.width == TINY.vocab
    assert exact <= CASES[op][0](rows, DEVICE).bytes_moved < 1.25 * exact
