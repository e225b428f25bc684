"""One token for every row at a time on the kernels of the training pass, as a CUDA graph.

The forward pass of the fused pieces (model/fused.py) runs on pairs: the token before and the token,
two positions of a row. So smear and the bigram rows find what they look back for, and nothing but
keys, values and the last token is carried from step to step; a product reads its weights once for
two positions as for one. What comes out of the first position is not used. Attention reads keys and
values of the whole capacity under a mask. All buffers keep their places, and the position lies on
the device, so that one recorded graph serves every step.

Shapes: B rows, P = 2 positions, N = B*P, C width, H query heads, K key/value heads, D head size,
S capacity, V vocabulary.
"""

import torch
import torch.nn.functional as F

from nanofuse.kernels.common.fp8 import MULTIPLE
from nanofuse.kernels.relu_squared import relu_squared_fwd
from nanofuse.kernels.softcap_cross_entropy import softcap_ref
from nanofuse.model.fp8.weights import LinearWeight
from nanofuse.model.fused import EVALUATION, fused_pieces
from nanofuse.model.graphs import captured
from nanofuse.model.pieces.mix import LOOKBACK
from nanofuse.model.pieces.stream import MicroStep, Stream

PAIR = 1 + LOOKBACK  # positions of a row in a step
CAPACITY_MULTIPLE = 256


def fits(config):
    """Whether the kernels take the sizes of a GPTConfig."""
    return config.n_embd % MULTIPLE == 0


class DecodeMLP:
    """The MLP as plain products: with few rows they are bound by the weights' bytes."""

    def __init__(self, module, layer):
        self.fc = LinearWeight(f"fc.{layer}", [module.c_fc])
        self.proj = LinearWeight(f"mlp_proj.{layer}", [module.c_proj])
        self.weights = (self.fc, self.proj)

    def forward(self, step, stream):
        gemm, normed = step.precision.gemm, stream.take_normed()
        hidden = gemm.forward(normed, step.precision.weight(self.fc))  # (N, 4C)
        activated = relu_squared_fwd(hidden)
        branch = gemm.forward(activated, step.precision.weight(self.proj))
        return Stream(stream.x, branch), None


class LayerCache:
    """Keys and values of one layer, (B, K, S, D) each, with the attention of one new position."""

    def __init__(self, decoder, layer):
        self.decoder, self.layer = decoder, layer

    def forward(
        self,
        q,  # (B, P, H, D)
        k,  # (B, P, K, D)
        v,  # (B, P, K, D)
        window,
    ):
        """Store the last position's k and v and attend with its q; y (B, P, H, D), in which the
        positions before have its values, and nothing for a backward pass."""
        decoder = self.decoder
        pair = decoder.keys[self.layer], decoder.values[self.layer]
        for held, new in zip(pair, (k, v), strict=True):
            held.index_copy_(2, decoder.position, new[:, -1, :, None])
        # the query heads of one key/value head are so many queries of it
        grouped = q[:, -1].unflatten(1, (k.size(2), -1))  # (B, K, H / K, D)
        y = F.scaled_dot_product_attention(grouped, *pair, attn_mask=decoder.masks[window])
        return y.reshape(q.size(0), 1, *q.shape[2:]).expand(q.shape), None


class Decoder:
    """Continues rows of one prefill, one token for each row in a step.

    Args:
        model: GPT; its weights are copied in its dtype, and later changes of them are not seen.
        graphs: record the second step, and replay it from then on.

    Raises:
        ValueError: a width that the kernels do not take.

    Attributes:
        graph: the recorded CUDA graph, or None.
    """

    def __init__(self, model, graphs):
        config = model.config
        if not fits(config):
            raise ValueError(f"decoding needs a width that is a multiple of {MULTIPLE}")
        self.model, self.graphs, self.graph = model, graphs, None
        device = model.cos.device
        self.rotary = [torch.zeros(PAIR, config.head_dim, device=device) for _ in range(2)]
        caches = [LayerCache(self, layer) for layer in range(config.n_layer)]
        *self.pieces, head = fused_pieces(model, self.rotary, caches, DecodeMLP)
        self.lm_head = head.lm_head
        for piece in (*self.pieces, head):
            for weight in piece.weights:
                parts = [linear.weight.detach() for linear in weight.linears]
                weight.operand = torch.cat(parts).to(model.dtype)  # (rows, columns)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of the new token
        self.tokens = self.keys = self.values = None
        self.steps = 0

    @torch.inference_mode()
    def start(self, cache, rows, positions):
        """Take over a prefilled row.

        Args:
            cache: model.engine.KVCache of one row, at least one position.
            rows: that continue it.
            positions: of a row at most, prefill and steps.

        Raises:
            ValueError: more positions than the rotary table has.
        """
        if positions > len(self.model.cos):
            raise ValueError(
                f"position {positions} is beyond the rotary table of {len(self.model.cos)}"
            )
        self._allocate(rows, positions)
        length = cache.length
        for held, prefilled in ((self.keys, cache.keys), (self.values, cache.values)):
            for mine, theirs in zip(held, prefilled, strict=True):
                mine[:, :, :length] = theirs[:, :length].transpose(1, 2)
        self.tokens[:, -1] = cache.prev_tokens[0, -1]
        self.position.fill_(length - 1)

    def _allocate(self, rows, positions):
        """Buffers for so many rows and positions, where those that are there do not serve."""
        capacity = -(-positions // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        there = (0, 0) if self.keys is None else (self.keys[0].size(0), self.keys[0].size(2))
        if there[0] == rows and there[1] >= capacity:
            return
        config, device = self.model.config, self.model.cos.device
        self.graph, self.steps = None, 0
        self.keys = self.values = None  # freed before the new ones are there
        shape = (rows, config.n_kv_head, capacity, config.head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=self.model.dtype, device=device) for _ in config.windows]
            for _ in range(2)
        )
        self.tokens = torch.zeros(rows, PAIR, dtype=torch.int64, device=device)
        self.next = torch.zeros(rows, dtype=torch.int64, device=device)
        self.indices = torch.arange(capacity, device=device)  # (S,)
        self.masks = {  # to be added to the scores
            window: torch.zeros(1, 1, 1, capacity, dtype=self.model.dtype, device=device)
            for window in set(config.windows)
        }

    @torch.inference_mode()
    def step(
        self,
        tokens,  # (B,) int64
    ):
        """Add a token to every row; softcapped logits (B, V) of what follows, fp32, which the next
        step overwrites. There must be room left.
        """
        self.next.copy_(tokens)
        self.steps += 1
        if not self.graphs or self.steps == 1:  # kernels are compiled by their first run
            return self._step()
        if self.graph is None:
            self.graph, self.logits = captured(self._step)
        self.graph.replay()
        return self.logits

    def _step(self):
        """What is recorded."""
        self.position += 1
        self.tokens.copy_(torch.cat([self.tokens[:, 1:], self.next[:, None]], dim=1))
        for row, table in zip(self.rotary, (self.model.cos, self.model.sin), strict=True):
            row[-1:].copy_(table.index_select(0, self.position))
        distance = self.position - self.indices  # (S,)
        for window, mask in self.masks.items():
            seen = (distance >= 0) & (distance <= window)
            mask.copy_(torch.where(seen, 0.0, -torch.inf))
        step = MicroStep(self.tokens, None, EVALUATION)
        stream = None
        for piece in self.pieces:
            stream, _ = piece.forward(step, stream)
        normed = stream.take_normed().unflatten(0, self.tokens.shape)[:, -1]  # (B, C)
        logits = EVALUATION.gemm.forward(normed, self.lm_head.operand)
        return softcap_ref(logits, self.model.config.vocab_size)
