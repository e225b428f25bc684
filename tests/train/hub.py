"""Exported models for the tests: loaded by transformers, with nothing from the network and no files
left behind."""

import os
import tempfile
from importlib.util import find_spec

import pytest

from nanofuse.train.hugging_face import to_hugging_face
from tests.helpers import random_model

HOME = tempfile.TemporaryDirectory()  # for the copies of modelling files, until the process ends
# read when the libraries are imported, which the tests do
os.environ.update(HF_HOME=HOME.name, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="needs the extra hf"
)
needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None or find_spec("accelerate") is None, reason="needs lm-eval"
)


def export(folder, config, dtype, tokenizer=None):
    """(our model with random weights in a dtype, the folder of its export in that dtype)."""
    model = random_model(config, dtype)
    name = str(dtype).removeprefix("torch.")
    to_hugging_face(folder, config, model.state_dict(), tokenizer, name)
    return model, folder


def load(folder, **kwargs):
    """The model that transformers makes of an exported folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)
