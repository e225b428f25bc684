"""The GPT: nanochat's architecture plus the hashed bigram residual, in plain PyTorch.

This is the definition that the fused pass (model/fused.py) reproduces and that the baselines
compile, assembled of the modules in model/pieces/. Its ops are the references of kernels/;
attention backend and FP8 are chosen by the caller. Module and parameter names are nanochat's, so
that its checkpoints map one to one; the bigram table and lambdas are added.
Shapes: B rows, T tokens, C width, H query heads, K key/value heads, D head size, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from nanofuse.kernels.common.rms_norm import rms_norm_ref
from nanofuse.kernels.rotary_qk_norm import rotary_table
from nanofuse.model.backends.torch_backends import SDPAttention
from nanofuse.model.config import ROTARY_BASE, ROTARY_LENGTHS
from nanofuse.model.pieces.attention import Attention
from nanofuse.model.pieces.embedding import Embedding
from nanofuse.model.pieces.head import Head
from nanofuse.model.pieces.mix import Backout, Mix, Tables
from nanofuse.model.pieces.mlp import MLP

# prefixes of the parameters' names by role, where they are not the role's name
PREFIXES = {
    "matrices": ("transformer.h.",),
    "wte": ("transformer.wte.",),
    "smear_backout": ("smear_", "backout_"),
}


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def init_weights(self, generator):
        self.attn.init_weights(generator)
        self.mlp.init_weights(generator)
        self.attn.init_gate(generator)

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


@dataclass
class Pieces:
    """The pieces outside of the blocks. Their parameters have their names in the GPT itself."""

    embedding: Embedding
    mix: Mix
    tables: Tables
    backout: Backout
    head: Head


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
        with torch.device(device or "cpu"):
            self.pieces = Pieces(
                Embedding(config), Mix(config), Tables(config), Backout(), Head(config)
            )
            blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            values = {
                str(layer): nn.Embedding(config.padded_vocab_size, config.kv_dim)
                for layer in config.value_embed_layers
            }
            table = rotary_table(config.sequence_len * ROTARY_LENGTHS, config.head_dim, ROTARY_BASE)
        self.transformer = nn.ModuleDict({"wte": self.pieces.embedding.wte, "h": blocks})
        self._adopt(self.pieces.mix)
        self._adopt(self.pieces.head)
        self.value_embeds = nn.ModuleDict(values)
        self._adopt(self.pieces.embedding, "wte")
        self._adopt(self.pieces.backout)
        self._adopt(self.pieces.tables)
        for name, values in zip(("cos", "sin"), table, strict=True):
            self.register_buffer(name, values, persistent=False)  # (10 * T, D) fp32
        if dtype == torch.float64:
            self.to(dtype)
        for embedding in self.tables():
            embedding.weight = nn.Parameter(embedding.weight.detach().to(dtype))

    def lookups(
        self,
        tokens,  # (B, T) integer
    ):
        """[(rows (B, T) integer, [tables (R, C)])]: all tables, those of which a training pass of
        these tokens reads the same rows together. No other row gets a gradient."""
        by_token = [self.transformer.wte, *self.value_embeds.values()]
        return [(tokens, [x.weight for x in by_token]), *self.pieces.tables.lookups(tokens)]

    def _adopt(self, piece, *elsewhere):
        """Register a piece's parameters and modules under their names as this module's own, but for
        those that have their place `elsewhere`."""
        for name, parameter in piece.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, module in piece.named_children():
            if name not in elsewhere:
                self.add_module(name, module)

    def tables(self):
        """The embedding tables: wte, the value embeddings and those of the mixes."""
        return [module for module in self.modules() if isinstance(module, nn.Embedding)]

    @torch.no_grad()
    def init_weights(self, seed=0):
        """Initialise every parameter as docs/recipe.md says; same seed and device, same weights.

        The order of the draws is nanochat's.
        """
        generator = torch.Generator(self.cos.device).manual_seed(seed)
        self.pieces.embedding.init_weights(generator)
        self.pieces.head.init_weights(generator)
        for block in self.transformer.h:
            block.init_weights(generator)
        bound = math.sqrt(3 / self.config.n_embd)
        for embedding in self.value_embeds.values():
            nn.init.uniform_(embedding.weight, -bound, bound, generator=generator)
        self.pieces.embedding.init_gate(generator)
        for piece in (self.pieces.mix, self.pieces.backout, self.pieces.tables):
            piece.init_weights()

    def param_roles(self):
        """Named parameters by role, {role: [(name, parameter)]}: the optimiser's groups.

        Every parameter is in exactly one role; "matrices" are those inside the blocks.
        """
        named = list(self.named_parameters())
        return {
            role: [(name, p) for name, p in named if name.startswith(PREFIXES.get(role, role))]
            for role in self.config.param_counts()
        }

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
        return self.pieces.head(self.hidden(tokens, cache), targets, reduction)

    def hidden(
        self,
        tokens,  # (B, T) integer
        cache=None,
    ):
        """What the head takes, (B, T, C) normalised; arguments and errors as of `forward`."""
        start = cache.length if cache is not None else 0
        stop = start + tokens.size(1)
        if stop > self.cos.size(0):
            raise ValueError(f"position {stop} is beyond the rotary table of {self.cos.size(0)}")
        rotary = self.cos[start:stop], self.sin[start:stop]  # (T, D) each
        attend = self.attention if cache is None else self.cached_attention
        before = cache.prev_tokens if cache is not None else None  # (B, P) or None
        prev_embedding = cache.prev_embedding if cache is not None else None  # (B, C) or None
        pieces = self.pieces

        x0, embedding = pieces.embedding(tokens, prev_embedding)  # (B, T, C) each
        looked_up = pieces.tables(tokens, before)
        x = x0
        for i, block in enumerate(self.transformer.h):
            x = pieces.mix(i, x, x0, looked_up)
            key = str(i)
            value = self.value_embeds[key](tokens) if key in self.value_embeds else None
            x = block(x, value, rotary, attend, cache)
            if i == self.config.middle_layer:
                x_mid = x
        if cache is not None:
            cache.advance(tokens, embedding[:, -1])
        return rms_norm_ref(pieces.backout(x, x_mid))


def count_parameters(model):
    """Parameters of a built model by role; equals GPTConfig.param_counts."""
    return {role: sum(p.numel() for _, p in ps) for role, ps in model.param_roles().items()}
