import math

import numpy as np
import pytest
import torch

from nanofuse.kernels.softcap_cross_entropy import IGNORE_INDEX
from nanofuse.model.backends.torch_backends import SDPAttention
from nanofuse.model.config import GPTConfig
from nanofuse.model.engine import KVCache
from nanofuse.model.gpt import GPT
from nanofuse.model.providers import ATTENTION, find
from tests.helpers import not_looked_up, random_model, small_config
from tests.model.reference import reference_logits


@pytest.mark.parametrize("fields", [{}, {"bigram_embed_factor": 0}, {"n_kv_head": 1}])
@pytest.mark.parametrize("length", [1, 2, 140])  # 140 crosses the short window of 128
def test_logits_equal_the_formulas_in_numpy(fields, length):
    config = small_config(**fields)
    model = random_model(config)
    tokens = torch.randint(
        config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1)
    )
    expected = reference_logits(model.state_dict(), config.to_dict(), tokens[0].tolist())
    np.testing.assert_allclose(model(tokens)[0].detach(), expected, rtol=1e-4, atol=2e-5)


def test_fp32_equals_fp64_to_1e_5():
    config = small_config()
    tokens = torch.randint(config.vocab_size, (2, 64))
    wide, narrow = random_model(config), random_model(config, torch.float32)
    with torch.no_grad():
        for p, q in zip(narrow.parameters(), wide.parameters(), strict=True):
            q.copy_(p)
    assert (wide(tokens) - narrow(tokens)).abs().max() < 1e-4


def test_initialisation_follows_the_recipe():
    config = GPTConfig.from_depth(6, vocab_size=4096, sequence_len=128)
    model = GPT(config)
    model.init_weights(seed=1)
    bound = math.sqrt(3 / config.n_embd)
    weights = dict(model.named_parameters())

    def spread(name, low, high):
        w = weights[name]
        assert low <= w.min() and w.max() <= high
        noise = 2 * (high - low) / math.sqrt(w.numel())
        assert abs(w.mean() - (low + high) / 2) < noise
        assert abs(w.std() - (high - low) / math.sqrt(12)) < noise

    assert abs(weights["transformer.wte.weight"].std() - 0.8) < 0.01
    assert abs(weights["lm_head.weight"].std() - 0.001) < 1e-5
    for layer in range(6):
        block = f"transformer.h.{layer}"
        for name in ("c_q", "c_k", "c_v"):
            spread(f"{block}.attn.{name}.weight", -bound, bound)
        spread(f"{block}.mlp.c_fc.weight", -0.4 * bound, 0.4 * bound)
        for name in ("attn", "mlp"):
            assert not weights[f"{block}.{name}.c_proj.weight"].any()
        assert (f"{block}.attn.ve_gate.weight" in weights) == (layer % 2 == 1)
    spread("value_embeds.5.weight", -bound, bound)
    spread("transformer.h.5.attn.ve_gate.weight", 0, 0.02)
    spread("smear_gate.weight", 0, 0.02)
    assert weights["resid_lambdas"].tolist() == pytest.approx([1.15 - 0.02 * i for i in range(6)])
    assert weights["x0_lambdas"].tolist() == pytest.approx([0.2 - 0.03 * i for i in range(6)])
    assert weights["bigram_lambdas"].tolist() == pytest.approx([0.05] * 6)
    assert weights["smear_lambda"].item() == 0
    assert weights["backout_lambda"].item() == pytest.approx(0.2)
    assert not weights["bigram_embed.weight"].any()


def test_seed_decides_the_weights():
    models = [GPT(small_config()) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.init_weights(seed)
    names = [n for n, p in models[0].named_parameters() if p.numel() > 100 and p.any()]
    a, b, c = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(a[n], b[n]) and not torch.equal(a[n], c[n]) for n in names)


def test_initial_loss_is_ln_vocab():
    config = small_config()
    model = GPT(config)
    model.init_weights()
    tokens = torch.randint(config.vocab_size, (2, 65), generator=torch.Generator().manual_seed(1))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    assert abs(loss.item() - math.log(config.vocab_size)) < 1e-3


@pytest.mark.parametrize("length", [20, 200])
def test_a_token_changes_nothing_before_it(length):
    config = small_config()
    model = random_model(config)
    tokens = torch.randint(config.vocab_size, (1, length))
    other = tokens.clone()
    other[0, length // 2] = (other[0, length // 2] + 1) % config.vocab_size
    a, b = model(tokens), model(other)
    assert torch.equal(a[:, : length // 2], b[:, : length // 2])
    assert (a[:, length // 2 :] != b[:, length // 2 :]).any(dim=-1).all()


def test_none_reduction_and_ignored_targets():
    config = small_config()
    model = random_model(config)
    tokens, targets = torch.randint(config.vocab_size, (2, 2, 10))
    targets[0, 3] = IGNORE_INDEX
    losses = model(tokens, targets, reduction="none")
    assert losses.shape == (20,) and losses[3] == 0
    torch.testing.assert_close(model(tokens, targets), losses.sum() / 19)


def test_every_parameter_is_in_one_role():
    model = GPT(small_config(), device="meta")
    names = [name for members in model.param_roles().values() for name, _ in members]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_every_parameter_gets_a_gradient():
    config = small_config()
    model = random_model(config).train()
    tokens, targets = torch.randint(config.vocab_size, (2, 3, 30))
    model(tokens, targets).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_rows_that_tokens_do_not_look_up_get_no_gradient():
    config = small_config()
    model = random_model(config).train()
    tokens, targets = torch.randint(config.vocab_size, (2, 3, 30))
    model(tokens, targets).backward()
    absent = not_looked_up(model, tokens)
    assert absent.keys() == {embedding.weight for embedding in model.tables()}
    for table, mask in absent.items():
        assert torch.equal(table.grad.any(dim=1), ~mask[:, 0])


def test_at_the_start_the_scales_of_the_stream_have_no_gradient():
    """At initialisation every block outputs zero, so the stream is a multiple of x0, and the final
    norm cancels the factor: in bf16 such gradients are rounding errors (dev/LOG.md, 2026-11-23)."""
    config = small_config()
    model = GPT(config, torch.float64).double()
    model.init_weights(seed=1)
    tokens = torch.randint(config.vocab_size, (2, 65), generator=torch.Generator().manual_seed(1))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    for name in ("resid_lambdas", "x0_lambdas", "backout_lambda"):
        assert model.get_parameter(name).grad.abs().max() < 1e-9, name
    assert model.smear_lambda.grad.abs() > 1e-6


def test_gradient_against_finite_differences():
    config = small_config()
    model = random_model(config)
    tokens, targets = torch.randint(config.vocab_size, (2, 1, 12))
    model(tokens, targets).backward()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        with torch.no_grad():
            p.add_(1e-6 * direction)
            high = model(tokens, targets)
            p.sub_(2e-6 * direction)
            low = model(tokens, targets)
            p.add_(1e-6 * direction)
        slope = ((high - low) / 2e-6).item()
        assert slope == pytest.approx((p.grad * direction).sum().item(), rel=1e-3, abs=1e-6), name


def test_tables_are_in_the_dtype_of_the_activations():
    model = GPT(small_config(), torch.bfloat16)
    tables = {id(table.weight) for table in model.tables()}
    assert len(tables) == 4  # wte, two layers' value embeddings, bigrams
    for p in model.parameters():
        assert p.dtype == (torch.bfloat16 if id(p) in tables else torch.float32)


def test_a_cache_goes_on_as_the_whole_row():
    """After prompts of several lengths, and tokens by twos."""
    config = small_config()
    model = random_model(config)
    tokens = torch.randint(config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens)
        for cuts in ((1, 2, 2, 2, 2), (4, 1, 4), (8, 1)):
            cache = KVCache(config, 1, torch.float64, "cpu", capacity=4)
            parts = [model(part, cache=cache) for part in tokens.split(cuts, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_positions_beyond_the_rotary_table_are_refused():
    config = small_config(sequence_len=8)
    model, cache = GPT(config), KVCache(config, 1, torch.float32, "cpu")
    tokens = torch.zeros(1, 81, dtype=torch.int64)
    with torch.no_grad():
        assert model(tokens[:, :80]).shape[1] == 80  # the last one is not
        model(tokens[:, :79], cache=cache)
        model(tokens[:, :1], cache=cache)
    for arguments in ((tokens,), (tokens[:, :1], None, "mean", cache)):
        with pytest.raises(ValueError, match="position 81 is beyond the rotary table of 80"):
            model(*arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_compiled_bf16_on_a_gpu_is_as_close_as_eager(attention):
    """Error of the compiled bf16 loss and gradients at most twice that of eager bf16."""
    config = GPTConfig.from_depth(4, sequence_len=512, vocab_size=1024)
    tokens, targets = torch.randint(1024, (2, 2, 512), device="cuda")
    truth = GPT(config, torch.float32, device="cuda")
    truth.init_weights()
    with torch.no_grad():
        for block in truth.transformer.h:
            block.attn.c_proj.weight.normal_(std=0.02)
            block.mlp.c_proj.weight.normal_(std=0.02)

    def grads(dtype, backend, compiled):
        model = GPT(config, dtype, backend, device="cuda")
        model.load_state_dict({k: v.to(model.state_dict()[k].dtype) for k, v in state.items()})
        backend.prepare(512, config.windows, "cuda")
        call = torch.compile(model, dynamic=False) if compiled else model
        loss = call(tokens, targets)
        loss.backward()
        return torch.cat([p.grad.float().flatten() for p in model.parameters()])

    state = truth.state_dict()
    exact = grads(torch.float32, SDPAttention(), compiled=False)
    eager = (grads(torch.bfloat16, SDPAttention(), compiled=False) - exact).norm()
    ours = (grads(torch.bfloat16, find(ATTENTION, attention).build(), compiled=True) - exact).norm()
    print(f"relative error: eager {eager / exact.norm():.4f}, compiled {ours / exact.norm():.4f}")
    assert ours <= 2 * eager
