"""The examples do what they say: on a CPU, with the kernels in the interpreter where they have any,
and at the command."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from examples import another_table, finetune_nanochat, own_model
from nanofuse.model.pieces.mix import ROWS
from nanofuse.train.assemble import assemble
from nanofuse.train.checkpoint import load_model
from nanofuse.train.device import select_fp8, select_machine
from nanofuse.train.errors import UserError
from nanofuse.train.generate import main as generate
from nanofuse.train.nanochat import to_nanochat
from nanofuse.train.optim.config import OptimConfig
from nanofuse.train.run_folder import find_checkpoint, run_dir
from tests.helpers import documents, random_model, small_config

ROOT = Path(__file__).parent.parent


def test_a_nanochat_checkpoint_learns_a_text_and_both_can_be_read(
    work_dir, tokenizer, capsys, short_muon
):
    model = random_model(small_config(bigram_embed_factor=0, sequence_len=64), torch.float32)
    base = work_dir / "nanochat/base_checkpoints/d2"
    base.parent.mkdir(parents=True)
    to_nanochat(base, model.config, 7, 1.5, model.state_dict(), tokenizer)
    losses = finetune_nanochat.finetune(base, " ".join(documents(60)), "tuned", steps=8, rows=2)
    assert losses[-1] < losses[0] - 0.1
    before, after = (find_checkpoint(run_dir("tuned"), step) for step in (7, 15))
    old, new = (load_model(x, torch.device("cpu"), torch.float32)[0] for x in (before, after))
    assert torch.equal(old.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(new.lm_head.weight, old.lm_head.weight)
    generate(["--run", "tuned", "--prompt", "the cat", "--max-tokens", "3"])
    assert "the cat" in capsys.readouterr().out


def test_what_cannot_be_tuned_is_told(work_dir, monkeypatch):
    (work_dir / "text").write_text("some text")
    (work_dir / "empty").touch()
    for given, match in (
        ([], "usage"),
        (["base", "gone", "x"], "TEXT gone cannot be read .No such file or directory.; name"),
        (["base", "empty", "x"], "TEXT is empty"),
        (["base", "text", "x"], "base holds no model_"),
    ):
        monkeypatch.setattr("sys.argv", ["finetune_nanochat", *given])
        with pytest.raises(UserError, match=match):
            finetune_nanochat.main()


def test_a_model_of_ones_own_learns_the_same_with_kernels():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    eager = own_model.train("eager", device)
    assert eager[-1] < eager[0] / 2
    kernel = own_model.train("kernel", device, steps=2)
    assert kernel == pytest.approx(eager[:2], rel=1e-4)


def test_another_table_learns_and_looks_up_other_rows(short_muon):
    config, optim = another_table.Config(**another_table.SMALL.to_dict()), another_table.Optim()
    model, two = another_table.train(config, optim, "eager", steps=6)
    assert config.num_params == sum(p.numel() for p in model.parameters())
    assert model.second_embed.weight.any()
    _, one = another_table.train(another_table.SMALL, OptimConfig(), "eager", steps=6)
    assert one[0] == two[0] and max(one[-1], two[-1]) < two[0] - 1  # tables start at zero
    tokens = torch.arange(64)[None].repeat(1, 4)
    rows = [ROWS[name][0](tokens, 96) for name in ("bigram", "second")]
    assert (rows[0] != rows[1]).float().mean() > 0.9


def test_the_fused_pass_has_the_gradient_of_another_table():
    small = {**another_table.SMALL.to_dict(), "n_layer": 1, "sequence_len": 16, "vocab_size": 64}
    config = another_table.Config(**small)
    tokens = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(1))
    weights = random_model(config, torch.float32).state_dict()
    grads = []
    for backend in ("eager", "fused"):
        machine = select_machine("auto", backend)
        made = assemble(
            config,
            machine,
            another_table.Optim(),
            select_fp8("off", machine, config, 1),
            cuda_graphs=False,
            set_weights=lambda model: model.load_state_dict(weights),
        )
        tokens = tokens.to(machine.device)
        made.model(tokens, tokens.roll(-1, 1)).backward()
        grads.append(made.raw_model.second_embed.weight.grad.float())
    assert grads[0].any()
    tolerance = 1e-5 if grads[0].device.type == "cpu" else 2e-2
    torch.testing.assert_close(*grads, rtol=0, atol=tolerance * grads[0].abs().max().item())


def test_the_page_names_every_example_and_they_run_as_it_says(capsys):
    page = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"python -m examples\.(\w+)", page))
    assert named == {path.stem for path in (ROOT / "examples").glob("*.py")}
    runpy.run_path(own_model.__file__, run_name="__main__")
    assert re.search(r"loss [\d.]+ -> [\d.]+", capsys.readouterr().out)
