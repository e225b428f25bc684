"""bench.decode without its GPU: what it compares, and the error that it refuses."""

import pytest

from nanofuse.bench import decode
from nanofuse.bench.decode import compare, main, milliseconds, random_model
from nanofuse.bench.harness import ON_GPU
from nanofuse.model.decode import Decoder
from nanofuse.train.errors import UserError
from tests.helpers import small_config


@pytest.mark.cpu
def test_both_paths_run_and_agree(monkeypatch):
    monkeypatch.setattr(decode, "WARM_STEPS", 1)
    monkeypatch.setattr(decode, "COMPARED_STEPS", 3)
    model = random_model(small_config(), "cpu")
    decoder = Decoder(model, graphs=False)
    kernels, plain = compare(model, decoder, [1, 2, 3], 2)
    print(f"errors {kernels:.1e} with the kernels, {plain:.1e} without")
    assert 0 < kernels < 0.05 and 0 < plain < 0.05
    assert milliseconds(model, decoder, [1, 2], 1, 2) > 0 < milliseconds(model, None, [1, 2], 1, 2)
    decoder.lm_head.operand = -decoder.lm_head.operand
    with pytest.raises(RuntimeError, match="with the kernels"):
        compare(model, decoder, [1, 2, 3], 2)


def test_without_a_gpu_it_says_so():
    if ON_GPU:
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        main([])
