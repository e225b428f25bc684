"""The GPT: nanochat's architecture plus the hashed bigram residual, in plain PyTorch.

This is the definition that the fused pass (model/fused.py) reproduces and that the baselines
compile. Its ops are the references of kernels/; attention backend and FP8 are chosen by the caller.
Module and parameter names are nanochat's, so that its checkpoints map one to one; the bigram table
and lambdas are added.
Shapes: B rows, T tokens, C width, H query heads, K key/value heads, D head size, V vocabulary.
"""

import math

import torch
from torch import nn

from nanofuse.kernels.backout import backout_ref
from nanofuse.kernels.bigram_rows import bigram_embedding_ref
from nanofuse.kernels.common.rms_norm import rms_norm_ref
from nanofuse.kernels.embed_smear import smear_ref
from nanofuse.kernels.relu_squared import relu_squared_ref
from nanofuse.kernels.residual_mix import residual_mix_ref
from nanofuse.kernels.rotary_qk_norm import rotary_qk_norm_ref, rotary_table, value_gate_ref
from nanofuse.kernels.softcap_cross_entropy import softcap_cross_entropy_ref, softcap_ref
from nanofuse.model.backends.torch_backends import SDPAttention
from nanofuse.model.config import (
    ROTARY_BASE,
    ROTARY_LENGTHS,
    SMEAR_GATE_CHANNELS,
    VALUE_GATE_CHANNELS,
)
from nanofuse.model.fp8.linear import Linear


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.window = layer, config.windows[layer]
        self.head_dim, self.n_kv_head = config.head_dim, config.n_kv_head
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.kv_dim)
        self.c_v = Linear(config.n_embd, config.kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if layer in config.value_embed_layers:
            self.ve_gate = Linear(VALUE_GATE_CHANNELS, config.n_kv_head)

    def forward(
        self,
        x,  # (B, T, C) normalised
        value_embedding,  # (B, T, K*D) or None
        rotary,  # cos, sin: (T, D) each
        attend,
        cache,
    ):
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (linear(x).view(heads) for linear in (self.c_q, self.c_k, self.c_v))
        if value_embedding is not None:
            gate = self.ve_gate(x[..., :VALUE_GATE_CHANNELS])  # (B, T, K)
            v = value_gate_ref(v, gate, value_embedding.view(heads))
        q, k = rotary_qk_norm_ref(q, k, *rotary)
        if cache is not None:
            k, v = cache.insert(self.layer, k, v)
        y = attend(q, k, v, self.window)  # (B, T, H, D)
        return self.c_proj(y.reshape(x.shape))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(
        self,
        x,  # (B, T, C) normalised
    ):
        return self.c_proj(relu_squared_ref(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x,  # (B, T, C)
        value_embedding,  # (B, T, K*D) or None
        rotary,  # cos, sin: (T, D) each
        attend,
        cache,
    ):
        x = x + self.attn(rms_norm_ref(x), value_embedding, rotary, attend, cache)
        return x + self.mlp(rms_norm_ref(x))


class GPT(nn.Module):
    """Decoder-only transformer; its weights are uninitialised until init_weights.

    Args:
        config: GPTConfig.
        dtype: of activations, wte, value embeddings and bigram table; everything else is kept in
            fp32 (fp64 with dtype fp64) and cast where it is used.
        attention: an attention backend of model.backends, prepared for the training length; None
            for SDPA.
        device: where the parameters are allocated; "meta" to count them only.
    """

    def __init__(self, config, dtype=torch.float32, attention=None, device=None):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.attention = attention or SDPAttention()
        self.cached_attention = SDPAttention()
        layers, c = config.n_layer, config.n_embd
        with torch.device(device or "cpu"):
            self.transformer = nn.ModuleDict(
                {
                    "wte": nn.Embedding(config.padded_vocab_size, c),
                    "h": nn.ModuleList(Block(config, layer) for layer in range(layers)),
                }
            )
            self.lm_head = Linear(c, config.padded_vocab_size)
            self.value_embeds = nn.ModuleDict(
                {
                    str(layer): nn.Embedding(config.padded_vocab_size, config.kv_dim)
                    for layer in config.value_embed_layers
                }
            )
            self.resid_lambdas = nn.Parameter(torch.empty(layers))
            self.x0_lambdas = nn.Parameter(torch.empty(layers))
            self.smear_gate = Linear(SMEAR_GATE_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.empty(1))
            self.backout_lambda = nn.Parameter(torch.empty(1))
            if config.bigram_embed_factor:
                self.bigram_embed = nn.Embedding(config.bigram_rows, c)
                self.bigram_lambdas = nn.Parameter(torch.empty(layers))
            table = rotary_table(config.sequence_len * ROTARY_LENGTHS, config.head_dim, ROTARY_BASE)
        for name, values in zip(("cos", "sin"), table, strict=True):
            self.register_buffer(name, values, persistent=False)  # (10 * T, D) fp32
        if dtype == torch.float64:
            self.to(dtype)
        for embedding in self.tables():
            embedding.to(dtype)

    def tables(self):
        """The embedding tables: wte, the value embeddings and the bigram table."""
        return [module for module in self.modules() if isinstance(module, nn.Embedding)]

    @torch.no_grad()
    def init_weights(self, seed=0):
        """Initialise every parameter as docs/recipe.md says; same seed and device, same weights."""
        config = self.config
        generator = torch.Generator(self.resid_lambdas.device).manual_seed(seed)
        bound = math.sqrt(3 / config.n_embd)

        def uniform(weight, low, high):
            nn.init.uniform_(weight, low, high, generator=generator)

        nn.init.normal_(self.transformer.wte.weight, std=0.8, generator=generator)
        nn.init.normal_(self.lm_head.weight, std=0.001, generator=generator)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                uniform(linear.weight, -bound, bound)
            uniform(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
            if hasattr(block.attn, "ve_gate"):
                uniform(block.attn.ve_gate.weight, 0.0, 0.02)
        for embedding in self.value_embeds.values():
            uniform(embedding.weight, -bound, bound)
        uniform(self.smear_gate.weight, 0.0, 0.02)
        depth_fraction = torch.arange(config.n_layer) / max(config.n_layer - 1, 1)
        self.resid_lambdas.copy_(1.15 - 0.10 * depth_fraction)
        self.x0_lambdas.copy_(0.20 - 0.15 * depth_fraction)
        self.smear_lambda.zero_()
        self.backout_lambda.fill_(0.2)
        if config.bigram_embed_factor:
            nn.init.zeros_(self.bigram_embed.weight)
            self.bigram_lambdas.fill_(config.bigram_lambda_init)

    def param_roles(self):
        """Named parameters by role, {role: [(name, parameter)]}: the optimiser's groups.

        Every parameter is in exactly one role; "matrices" are those inside the blocks.
        """
        prefixes = {
            "matrices": ("transformer.h.",),
            "lm_head": ("lm_head.",),
            "wte": ("transformer.wte.",),
            "value_embeds": ("value_embeds.",),
            "bigram_embed": ("bigram_embed.",),
            "resid_lambdas": ("resid_lambdas",),
            "x0_lambdas": ("x0_lambdas",),
            "smear_backout": ("smear_", "backout_"),
            "bigram_lambdas": ("bigram_lambdas",),
        }
        named = list(self.named_parameters())
        roles = {
            role: [(name, p) for name, p in named if name.startswith(prefix)]
            for role, prefix in prefixes.items()
        }
        return {role: members for role, members in roles.items() if members}

    def forward(
        self,
        tokens,  # (B, T) integer
        targets=None,  # (B, T) int64 in [0, V), or -1: ignored
        reduction="mean",
        cache=None,
    ):
        """Softcapped logits (B, T, V) fp32; with targets the loss in nats, NaN for a target other
        than these.

        Args:
            reduction: of the loss: "mean", (), or "none", (B*T,).
            cache: model.engine.KVCache whose rows the tokens continue; it is extended.

        Raises:
            ValueError: positions beyond the rotary table (10 times sequence_len).
        """
        start = cache.length if cache is not None else 0
        stop = start + tokens.size(1)
        if stop > self.cos.size(0):
            raise ValueError(f"position {stop} is beyond the rotary table of {self.cos.size(0)}")
        rotary = self.cos[start:stop], self.sin[start:stop]  # (T, D) each
        attend = self.attention if cache is None else self.cached_attention
        prev_token = cache.prev_token if cache is not None else None  # (B,) or None
        prev_embedding = cache.prev_embedding if cache is not None else None  # (B, C) or None

        embedding = rms_norm_ref(self.transformer.wte(tokens))  # (B, T, C)
        gate = self.smear_gate(embedding[..., :SMEAR_GATE_CHANNELS])  # (B, T, 1)
        x = x0 = smear_ref(embedding, gate, self.smear_lambda, prev_embedding)
        bigram = None
        if self.config.bigram_embed_factor:
            bigram = bigram_embedding_ref(tokens, self.bigram_embed.weight, prev_token)
        for i, block in enumerate(self.transformer.h):
            looked_up = () if bigram is None else ((bigram, self.bigram_lambdas[i]),)
            x = residual_mix_ref(x, x0, self.resid_lambdas[i], self.x0_lambdas[i], looked_up)
            key = str(i)
            value = self.value_embeds[key](tokens) if key in self.value_embeds else None
            x = block(x, value, rotary, attend, cache)
            if i == self.config.n_layer // 2:
                x_mid = x
        x = rms_norm_ref(backout_ref(x, x_mid, self.backout_lambda))
        logits = self.lm_head(x)  # (B, T, V padded)
        if cache is not None:
            cache.advance(tokens[:, -1], embedding[:, -1], tokens.size(1))
        if targets is None:
            return softcap_ref(logits, self.config.vocab_size)
        return softcap_cross_entropy_ref(
            logits.view(-1, logits.size(-1)),
            targets.reshape(-1),
            self.config.vocab_size,
            reduction=reduction,
        )


def count_parameters(model):
    """Parameters of a built model by role; equals GPTConfig.param_counts."""
    return {role: sum(p.numel() for _, p in ps) for role, ps in model.param_roles().items()}
