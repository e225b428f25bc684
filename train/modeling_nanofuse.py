"""The GPT of a nanofuse checkpoint for Hugging Face's transformers, in plain PyTorch.

`python -m train.export hf` puts this file beside the weights, and transformers loads it from there
with trust_remote_code=True. It stands alone: nothing of nanofuse is imported. The model is
nanochat's architecture with an optional hashed bigram table; docs/recipe.md of nanofuse has every
formula.

Tensors that a decoding step needs of the positions before are keys, values and token ids. The ids
lie in the KV cache as one more layer, so that whatever reorders, crops or repeats the cache does it
to them as well.

Shapes: B rows, T new tokens, S positions in all, C width, H query heads, K key/value heads, D head
size, V vocabulary.
"""

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

VOCAB_MULTIPLE = 64
WINDOW_MULTIPLE = 128
SMEAR_GATE_CHANNELS = 24
VALUE_GATE_CHANNELS = 12
VALUE_GATE_SCALE = 3.0
QK_GAIN = 1.2
ROTARY_BASE = 100_000
LOGIT_SOFTCAP = 15.0
EPS = torch.finfo(torch.float32).eps
HASH_CURRENT, HASH_PREVIOUS = 36313, 27191
# An activation that no other class has, so that they refuse the config.
ACTIVATION = "relu2 of a nanofuse model: load it with trust_remote_code=True"


def round_up(n, multiple):
    return -(-n // multiple) * multiple


class NanofuseConfig(PretrainedConfig):
    """Sizes of the model; fields are those of nanofuse's GPTConfig.

    Raises:
        ValueError: tied embeddings, which the model does not have.
    """

    model_type = "nanofuse"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "sequence_len",
    }

    def __init__(
        self,
        n_layer=16,
        n_head=8,
        n_kv_head=8,
        n_embd=1024,
        sequence_len=2048,
        vocab_size=32768,
        window_pattern="SSSL",
        bigram_embed_factor=0,
        bigram_lambda_init=0.05,
        use_cache=True,
        **kwargs,
    ):
        if kwargs.pop("tie_word_embeddings", False):
            raise ValueError(
                "a nanofuse model does not tie its embeddings: drop tie_word_embeddings"
            )
        self.n_layer, self.n_head, self.n_kv_head = n_layer, n_head, n_kv_head
        self.n_embd, self.sequence_len, self.vocab_size = n_embd, sequence_len, vocab_size
        self.window_pattern = window_pattern
        self.bigram_embed_factor = bigram_embed_factor
        self.bigram_lambda_init = bigram_lambda_init
        self.hidden_act = ACTIVATION
        self.use_cache = use_cache
        kwargs.pop("hidden_act", None)
        super().__init__(tie_word_embeddings=False, **kwargs)

    @property
    def windows(self):
        """Keys to the left that each layer attends to; the last layer sees the whole row."""
        short = min(round_up(-(-self.sequence_len // 4), WINDOW_MULTIPLE), self.sequence_len)
        sizes = {"S": short, "L": self.sequence_len}
        pattern = self.window_pattern
        letters = [pattern[i % len(pattern)] for i in range(self.n_layer)]
        return [sizes[letter] for letter in letters[:-1]] + [self.sequence_len]

    def has_value_embedding(self, layer):
        return layer % 2 == (self.n_layer - 1) % 2


def rms_norm(
    x,  # (..., D)
):
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def rotary(
    positions,  # (B or 1, T) int64
    head_dim,
):
    """Cosines and sines, (B or 1, T, 1, D) fp32, the second half of the sines negated."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[..., None, None] * (1.0 / ROTARY_BASE**exponent)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, -sin], dim=-1)


def rotate(
    x,  # (B, T, heads, D)
    cos,  # (B or 1, T, 1, D) fp32
    sin,  # (B or 1, T, 1, D) fp32
):
    return (x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.head_dim = config.n_embd // config.n_head
        kv_dim = config.n_kv_head * self.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if config.has_value_embedding(layer):
            self.ve_gate = nn.Linear(VALUE_GATE_CHANNELS, config.n_kv_head, bias=False)

    def forward(
        self,
        x,  # (B, T, C) normalised
        value_embedding,  # (B, T, K*D) or None
        angles,  # cos, sin: (B or 1, T, 1, D) each
        mask,  # arguments of scaled_dot_product_attention
        cache,
    ):
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (linear(x).view(heads) for linear in (self.c_q, self.c_k, self.c_v))
        if value_embedding is not None:
            gate = self.ve_gate(x[..., :VALUE_GATE_CHANNELS])  # (B, T, K)
            scale = VALUE_GATE_SCALE * torch.sigmoid(gate)
            v = v + scale.unsqueeze(-1) * value_embedding.view(heads)
        q, k = (rotate(rms_norm(x) * QK_GAIN, *angles) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # (B, K, S, D) each
        grouped = q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **mask)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(
        self,
        x,  # (B, T, C) normalised
    ):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x,  # (B, T, C)
        *attention,  # further arguments of Attention
    ):
        x = x + self.attn(rms_norm(x), *attention)
        return x + self.mlp(rms_norm(x))


class NanofuseForCausalLM(PreTrainedModel, GenerationMixin):
    """The model. Parameters have the names of nanofuse's checkpoints, and nanochat's."""

    config_class = NanofuseConfig
    base_model_prefix = ""
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    # what scales the stream is applied in fp32 whatever the dtype of the rest, as in training
    _keep_in_fp32_modules_strict = ["resid_lambdas", "x0_lambdas", "bigram_lambdas"]

    def __init__(self, config):
        super().__init__(config)
        padded = round_up(config.vocab_size, VOCAB_MULTIPLE)
        width, layers = config.n_embd, config.n_layer
        kv_dim = config.n_kv_head * (width // config.n_head)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(padded, width),
                "h": nn.ModuleList(Block(config, layer) for layer in range(layers)),
            }
        )
        self.value_embeds = nn.ModuleDict(
            {
                str(layer): nn.Embedding(padded, kv_dim)
                for layer in range(layers)
                if config.has_value_embedding(layer)
            }
        )
        self.smear_gate = nn.Linear(SMEAR_GATE_CHANNELS, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.resid_lambdas = nn.Parameter(torch.ones(layers))
        self.x0_lambdas = nn.Parameter(torch.zeros(layers))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        if config.bigram_embed_factor:
            self.bigram_embed = nn.Embedding(config.vocab_size * config.bigram_embed_factor, width)
            self.bigram_lambdas = nn.Parameter(torch.full((layers,), config.bigram_lambda_init))
        self.lm_head = nn.Linear(width, padded, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer["wte"]

    def get_output_embeddings(self):
        return self.lm_head

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError(
            "the vocabulary of a nanofuse model is fixed: its bigram hash depends on it"
        )

    def _remember(
        self,
        cache,
        tokens,  # (B, T)
    ):
        """Add tokens to those of the cache; returns all of them, (B, S)."""
        if not isinstance(cache, DynamicCache):
            kind = type(cache).__name__
            raise ValueError(f"a nanofuse model decodes with a DynamicCache, not with a {kind}")
        layers, past = self.config.n_layer, cache.get_seq_length()
        while len(cache.layers) <= layers:  # one more than generate() makes
            cache.layers.append(DynamicLayer())
        ids = tokens[:, None, :, None]
        held = cache.update(ids, ids, layers)[0][:, 0, :, 0]
        if held.size(1) != past + tokens.size(1):
            raise ValueError("the cache was filled by another model; start with an empty one")
        return held

    def _masks(
        self,
        real,  # (B, S) bool or None
        length,  # T
        total,  # S
    ):
        """{window: arguments of scaled_dot_product_attention}; a position that is padding sees
        itself, as a softmax over nothing would be NaN."""
        found = {}
        for window in set(self.config.windows):
            if real is None and length == total and window >= total - 1:
                found[window] = {"is_causal": True}
                continue
            keys = torch.arange(total, device=self.device)
            distance = keys[total - length :, None] - keys  # (T, S)
            seen = (distance >= 0) & (distance <= window)
            if real is not None:
                seen = seen & real[:, None, None, :] | (distance == 0)  # (B, 1, T, S)
            found[window] = {"attn_mask": seen}
        return found

    def _bigram_rows(
        self,
        tokens,  # (B, T)
        previous,  # (B, T) token before each
        follows,  # (B, T) bool: whether there is one
    ):
        """(B, T) rows of the bigram table; the last one stands for no token before."""
        last = self.bigram_embed.num_embeddings - 1
        rows = torch.bitwise_xor(HASH_CURRENT * tokens, HASH_PREVIOUS * previous) % last
        return torch.where(follows, rows, last)

    def forward(
        self,
        input_ids=None,  # (B, T) int64
        attention_mask=None,  # (B, S), 0 for padding on either side
        position_ids=None,  # (B, T) int64
        cache=None,
        past_key_values=None,
        labels=None,  # (B, T) int64, -100: ignored
        use_cache=None,
        logits_to_keep=0,
        inputs_embeds=None,
        return_dict=None,
        **kwargs,
    ):
        """Softcapped logits (B, T or logits_to_keep, V) in fp32, with labels the loss too.

        Args:
            cache, past_key_values: a DynamicCache, under either name; transformers changed it.

        Raises:
            ValueError: no input_ids, or a cache or mask that does not fit.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("a nanofuse model looks tokens up in several tables: give input_ids")
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = None if self.training else DynamicCache()
        tokens = input_ids.long()
        whole = tokens if cache is None else self._remember(cache, tokens)
        length, total = tokens.size(1), whole.size(1)
        real = None
        if attention_mask is not None:
            if attention_mask.shape != whole.shape:
                raise ValueError(
                    f"attention_mask must be {tuple(whole.shape)}, rows and all positions, "
                    f"got {tuple(attention_mask.shape)}"
                )
            real = None if attention_mask.bool().all() else attention_mask.bool()
        if position_ids is None:
            counted = torch.ones_like(whole) if real is None else real.long()
            position_ids = (counted.cumsum(dim=1) - 1).clamp(min=0)[:, total - length :]

        own = slice(total - length, None)
        previous = F.pad(whole, (1, 0))[:, :-1][:, own]  # (B, T)
        follows = torch.ones_like(whole, dtype=torch.bool) if real is None else real
        follows = F.pad(follows, (1, 0))[:, :-1][:, own]  # (B, T) whether `previous` is a token

        wte = self.transformer["wte"]
        embedding = rms_norm(wte(tokens))
        scale = self.smear_lambda.to(embedding.dtype) * torch.sigmoid(
            self.smear_gate(embedding[..., :SMEAR_GATE_CHANNELS])
        )  # (B, T, 1)
        smeared = embedding + scale * rms_norm(wte(previous))
        x0 = torch.where(follows[..., None], smeared, embedding)
        bigram = None
        if self.config.bigram_embed_factor:
            bigram = self.bigram_embed(self._bigram_rows(tokens, previous, follows))
        masks = self._masks(real, length, total)
        angles = rotary(position_ids, self.config.n_embd // self.config.n_head)
        x = x0
        for layer, block in enumerate(self.transformer["h"]):
            x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            if bigram is not None:
                x = x + self.bigram_lambdas[layer] * bigram
            key = str(layer)
            value = self.value_embeds[key](tokens) if key in self.value_embeds else None
            x = block(x, value, angles, masks[self.config.windows[layer]], cache)
            if layer == self.config.n_layer // 2:
                middle = x
        x = rms_norm(x - self.backout_lambda.to(x.dtype) * middle)

        kept = logits_to_keep
        if isinstance(kept, int):
            kept = slice(-kept, None) if kept else slice(None)
        logits = self.lm_head(x[:, kept])[..., : self.config.vocab_size].float()
        logits = LOGIT_SOFTCAP * torch.tanh(logits * (1 / LOGIT_SOFTCAP))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        names = {field.name for field in fields(CausalLMOutputWithPast)}
        held = {"cache" if "cache" in names else "past_key_values": cache}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **held)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()
