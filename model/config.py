"""Shape of a GPT and everything that follows from it: counts, windows, FLOPs, memory."""

from dataclasses import asdict, dataclass
from typing import Any

from nanofuse.model.option import option

VOCAB_MULTIPLE = 64
SMEAR_GATE_CHANNELS = 24
VALUE_GATE_CHANNELS = 12
WINDOW_MULTIPLE = 128
ROTARY_BASE = 100_000
ROTARY_LENGTHS = 10  # the rotary table covers this many times sequence_len

# GPTConfig's fields that nanochat's model_config has
NANOCHAT_FIELDS = (
    "sequence_len",
    "vocab_size",
    "n_layer",
    "n_head",
    "n_kv_head",
    "n_embd",
    "window_pattern",
)
# those that its branch with a bigram table adds
BIGRAM_FIELDS = ("bigram_embed_factor", "bigram_lambda_init")

MAX_LAYERS = 4096
MAX_SEQUENCE = 2**24
MAX_VOCABULARY = 2**20
SHAPE = "the weights have that shape"  # why a resumed run keeps a value


def round_up(n: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Dials:
    """What one sets to get a GPT's shape; every field is a flag of train.run."""

    depth: int = option(16, "layers; the one dial of size", least=1, most=MAX_LAYERS, fixed=SHAPE)
    aspect_ratio: int = option(64, "width per layer of depth", least=1, most=2**16, fixed=SHAPE)
    head_dim: int = option(128, "size of an attention head", least=1, most=2**16, fixed=SHAPE)
    n_kv_head: int = option(
        0,
        "key/value heads, a divisor of the heads (0: as many as query heads)",
        least=0,
        most=2**16,
        fixed=SHAPE,
    )
    max_seq_len: int = option(
        2048, "tokens per row", least=1, most=MAX_SEQUENCE, fixed="the loader's state has such rows"
    )
    window_pattern: str = option(
        "SSSL",
        "attention windows, tiled: S quarter row, L whole, in either case",
        fixed="the weights were trained with it",
    )
    vocab_size: int = option(
        32768,
        "tokens of the tokenizer, where one is trained",
        least=1,
        most=MAX_VOCABULARY,
        fixed=SHAPE,
    )
    bigram_embed_factor: int = option(
        5, "bigram rows per vocabulary entry (0: dense)", least=0, most=2**20, fixed=SHAPE
    )
    bigram_lambda_init: float = option(
        0.05,
        "start of every layer's bigram lambda",
        least=-1000,
        most=1000,
        fixed="only a new run starts from it",
    )

    def config(self) -> "GPTConfig":
        """The shape: width depth * aspect_ratio, rounded up to whole heads.

        Raises:
            ValueError: sizes that do not fit together.
        """
        for name in ("depth", "aspect_ratio", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim {self.head_dim} is odd; rotary needs an even head dimension"
            )
        n_embd = round_up(self.depth * self.aspect_ratio, self.head_dim)
        n_head = n_embd // self.head_dim
        return GPTConfig(
            n_layer=self.depth,
            n_embd=n_embd,
            n_head=n_head,
            n_kv_head=self.n_kv_head or n_head,
            sequence_len=self.max_seq_len,
            vocab_size=self.vocab_size,
            window_pattern=self.window_pattern,
            bigram_embed_factor=self.bigram_embed_factor,
            bigram_lambda_init=self.bigram_lambda_init,
        )


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of one GPT; field names are nanochat's, `bigram_*` this recipe's.

    Raises:
        ValueError: sizes that do not fit together; the message names the fields.
    """

    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    sequence_len: int = Dials.max_seq_len
    vocab_size: int = Dials.vocab_size
    window_pattern: str = Dials.window_pattern
    bigram_embed_factor: int = Dials.bigram_embed_factor
    bigram_lambda_init: float = Dials.bigram_lambda_init

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.head_dim % 2:
            raise ValueError(f"head dimension {self.head_dim} is odd; rotary needs an even one")
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}; choose a divisor"
            )
        if self.n_embd < SMEAR_GATE_CHANNELS:
            raise ValueError(
                f"n_embd {self.n_embd} is below the {SMEAR_GATE_CHANNELS} channels of the smear "
                "gate; raise depth or aspect_ratio"
            )
        if not self.window_pattern or set(self.window_pattern) - set("SLsl"):
            raise ValueError(
                f"window_pattern {self.window_pattern!r} must consist of the letters S and L"
            )
        if len(self.window_pattern) > MAX_LAYERS:
            raise ValueError(f"window_pattern has more than {MAX_LAYERS:,} letters")
        object.__setattr__(self, "window_pattern", self.window_pattern.upper())
        if self.bigram_embed_factor < 0:
            raise ValueError(
                f"bigram_embed_factor {self.bigram_embed_factor} is negative; 0 turns it off"
            )

    @classmethod
    def from_depth(
        cls,
        depth: int,
        aspect_ratio: int = Dials.aspect_ratio,
        head_dim: int = Dials.head_dim,
        n_kv_head: int = Dials.n_kv_head,
        sequence_len: int = Dials.max_seq_len,
        **dials: Any,
    ) -> "GPTConfig":
        """Dials.config under this class's name for the row length.

        Raises:
            ValueError: sizes that do not fit together.
        """
        return Dials(depth, aspect_ratio, head_dim, n_kv_head, sequence_len, **dials).config()

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_dim(self) -> int:
        return self.n_kv_head * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, VOCAB_MULTIPLE)

    @property
    def table_rows(self) -> dict[str, int]:
        """Rows of every table that the residual mixes look up, by name; none in a dense model.

        The bigram table's include the reserved last one.
        """
        rows = {"bigram": self.vocab_size * self.bigram_embed_factor}
        return {name: count for name, count in rows.items() if count}

    @property
    def middle_layer(self) -> int:
        """Index of the layer after which the stream is kept for backout."""
        return self.n_layer // 2

    @property
    def value_embed_layers(self) -> list[int]:
        """Indices of the layers that have a value embedding: every other one, the last included."""
        return [i for i in range(self.n_layer) if i % 2 == (self.n_layer - 1) % 2]

    @property
    def windows(self) -> list[int]:
        """Keys to the left that each layer attends to, one int per layer."""
        short = round_up(-(-self.sequence_len // 4), WINDOW_MULTIPLE)
        sizes = {"S": min(short, self.sequence_len), "L": self.sequence_len}
        pattern = self.window_pattern
        letters = [pattern[i % len(pattern)] for i in range(self.n_layer)]
        return [sizes[letter] for letter in letters[:-1]] + [sizes["L"]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def param_counts(self) -> dict[str, int]:
        """Number of parameters by role, in the order of GPT.param_roles."""
        c, layers = self.n_embd, len(self.value_embed_layers)
        attention = 2 * c * c + 2 * c * self.kv_dim
        gates = layers * self.n_kv_head * VALUE_GATE_CHANNELS
        counts = {
            "matrices": self.n_layer * (attention + 8 * c * c) + gates,
            "lm_head": self.padded_vocab_size * c,
            "wte": self.padded_vocab_size * c,
            "value_embeds": layers * self.padded_vocab_size * self.kv_dim,
            **{f"{name}_embed": rows * c for name, rows in self.table_rows.items()},
            "resid_lambdas": self.n_layer,
            "x0_lambdas": self.n_layer,
            "smear_backout": SMEAR_GATE_CHANNELS + 2,
            **{f"{name}_lambdas": self.n_layer for name in self.table_rows},
        }
        return {role: count for role, count in counts.items() if count}

    @property
    def num_params(self) -> int:
        return sum(self.param_counts().values())

    @property
    def num_scaling_params(self) -> int:
        """Parameters that scaling laws count: block matrices and lm_head (docs/recipe.md)."""
        counts = self.param_counts()
        return counts["matrices"] + counts["lm_head"]

    @property
    def flops_per_token(self) -> int:
        """Forward + backward FLOPs of one token: 6 per matmul parameter plus attention.

        Attention costs 12 * heads * head_dim per key, over min(window, T) keys
        (PaLM appendix B, https://arxiv.org/abs/2204.02311). Lookups and scalars cost nothing.
        """
        keys = sum(min(window, self.sequence_len) for window in self.windows)
        return 6 * self.num_scaling_params + 12 * self.n_embd * keys

    def memory_estimate(
        self, batch_size: int, activation_bytes: int, fp8: bool = False, backend: str = "eager"
    ) -> int:
        """Rough peak bytes of a training micro-step of batch_size rows of sequence_len tokens.

        State is exact: fp32 weight, gradient and momentum for the matrices, a second moment more
        for lm_head, weight, gradient and two moments in `activation_bytes` for the tables. The
        activations per layer are those a block saves for backward: q, k, v, the attention output,
        two norms and the stream (7 widths), the MLP's pre-activation and activation (8 widths);
        under FP8 the 3 + 4 widths that feed a matrix product are saved in one byte instead (the
        fused pass keeps no pre-activation, but the activation in two layouts: as many bytes).
        Of the logits the fused pass has a factor of their gradient alone, in the activation type or
        in FP8 in two layouts, and the compiled one the logits themselves and 4 bytes.

        Autograd in eager mode saves more, as counted by tests/model/test_memory_estimate.py: in
        each layer the inputs of the four norms in fp32 and their statistics (17 bytes), under FP8
        the operand of q, k and v three times, outside of the layers what embedding, smear, x0 and
        backout save, and the weights that were cast; of a logit tanh and exp in fp32 and a mask (9
        bytes). The peak is in the loss, where three temporaries of the logits come to that.
        """
        counts, width = self.param_counts(), self.n_embd
        looked_up = sum(counts[f"{name}_embed"] for name in self.table_rows)
        tables = counts["wte"] + counts.get("value_embeds", 0) + looked_up
        state = 12 * counts["matrices"] + 16 * counts["lm_head"] + 4 * activation_bytes * tables
        tokens = batch_size * self.sequence_len
        layer = 8 * activation_bytes + 7 if fp8 else 15 * activation_bytes
        if backend != "eager":
            factor = 2 if fp8 else activation_bytes
            per_logit = factor if backend == "fused" else activation_bytes + 4
            per_token = self.n_layer * width * layer + self.padded_vocab_size * per_logit
            return state + tokens * per_token
        layer += 17 + 2 * fp8
        outside = (4 + len(self.table_rows)) * activation_bytes + 8
        saved = (self.n_layer * layer + outside) * width + 9 * self.padded_vocab_size
        of_loss = (activation_bytes + 8) * self.padded_vocab_size
        of_layer = 12 * activation_bytes * width  # more, where the vocabulary is small
        cast = activation_bytes * (counts["matrices"] + counts["lm_head"])
        if activation_bytes == 4 or not batch_size:
            cast = 0
        return state + cast + tokens * (saved + max(of_loss, of_layer))
