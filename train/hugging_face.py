"""A run's checkpoint as a folder that Hugging Face's transformers and tokenizers load.

    config.json, generation_config.json, model.safetensors, modeling_nanofuse.py
    tokenizer.json, tokenizer_config.json                   where the run has a tokenizer

The config's model_type is this project's own, so that no class of transformers takes the weights
for its own and leaves parts out: the model loads with the modelling file beside it
(trust_remote_code=True), or not at all. Weights are written as they are, names included.
"""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import torch

from nanofuse.train.checkpoint import write_tensors
from nanofuse.train.data.tokenizer import BOS, NUM_BYTES, PROBE, SPECIAL_TOKENS
from nanofuse.train.disk import saving
from nanofuse.train.errors import UserError
from nanofuse.train.files import atomic_folder

MODELLING = Path(__file__).with_name("modeling_nanofuse.py")
INSTALL = "pip install 'nanofuse[hf]'"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def byte_letters():
    """The character that stands for each byte in the files of byte-level tokenizers: itself where
    it is visible in Latin-1, else the next one from U+0100 on (GPT-2's scheme)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(spare)) for byte in range(NUM_BYTES)]


def merge_of(token, ranks):
    """The two tokens that tiktoken joins last on its way to `token`, or None where it never gets
    there from single bytes.

    It joins the neighbours whose joint bytes have the lowest rank, the leftmost of equals. What
    stands beside the token in a text changes nothing: a join across its border would have taken the
    border away.

    Args:
        ranks: {bytes: rank} of all tokens.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joint = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        best = min(joint)
        if best == len(ranks):
            return None
        at = joint.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


def fast_tokenizer(tokenizer):
    """tokenizers.Tokenizer with the ids of a train.data.tokenizer.Tokenizer for every text.

    A whole piece that is a token is that token, as with tiktoken; other pieces are merged pair by
    pair, in the order of the ranks.

    Raises:
        UserError: its pattern means something else to that library.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    letters = byte_letters()

    def name(token):
        return "".join(letters[byte] for byte in token)

    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    pairs = [merge_of(token, ranks) for token in tokenizer.tokens if len(token) > 1]
    made = Tokenizer(
        models.BPE(
            vocab={name(token): rank for token, rank in ranks.items()},
            merges=[(name(a), name(b)) for a, b in filter(None, pairs)],
            ignore_merges=True,
        )
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    made.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.bos)]
    )
    if made.encode(PROBE, add_special_tokens=False).ids != tokenizer.encode(PROBE):
        raise UserError("the tokenizer's pattern splits text otherwise in the library tokenizers")
    return made


def save_tokenizer(folder, tokenizer, length):
    """Write the tokenizer's files. Names of special tokens in a text are ordinary text, unless one
    asks otherwise (split_special_tokens=False), and `<|bos|>` goes before it.

    Args:
        length: tokens of a row in training.
    """
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(tokenizer),
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_max_length=length,
        padding_side="left",
    ).save_pretrained(folder)


def config_text(config, bos, dtype):
    """config.json of a GPTConfig.

    Args:
        bos: id of `<|bos|>`, which ends a document too, or None.
        dtype: name of the weights' dtype.
    """
    from nanofuse.train.modeling_nanofuse import NanofuseConfig, NanofuseForCausalLM

    module = MODELLING.stem
    made = NanofuseConfig(
        **config.to_dict(),
        architectures=[NanofuseForCausalLM.__name__],
        auto_map={
            "AutoConfig": f"{module}.{NanofuseConfig.__name__}",
            "AutoModelForCausalLM": f"{module}.{NanofuseForCausalLM.__name__}",
        },
        bos_token_id=bos,
        eos_token_id=bos,
        pad_token_id=bos,
        dtype=dtype,
    )
    return made.to_json_string()


def to_hugging_face(target, config, tensors, tokenizer=None, dtype="float32"):
    """Write a model's folder.

    Args:
        target: folder to be made.
        config: GPTConfig.
        tensors: {name: tensor} of the checkpoint.
        tokenizer: of the model; None: none is written.
        dtype: of the weights, a name of DTYPES. What scales the stream is always float32.

    Raises:
        UserError: the folder exists, or cannot be written, or transformers is not installed.
    """
    target = Path(target)
    if os.path.lexists(target):
        raise UserError(f"{target} exists; name a folder to be made")
    try:
        from nanofuse.train.modeling_nanofuse import NanofuseForCausalLM
    except ImportError as error:
        raise UserError(f"export hf needs transformers 5 ({error}); {INSTALL}") from None
    exact = set(NanofuseForCausalLM._keep_in_fp32_modules_strict)
    bos = tokenizer.bos if tokenizer else None
    weights = {
        name: tensor.to(torch.float32 if name in exact else DTYPES[dtype]).contiguous()
        for name, tensor in tensors.items()
    }
    with saving(target, weights), atomic_folder(target) as folder:
        write_tensors(folder / "model.safetensors", weights, {"format": "pt"})
        (folder / "config.json").write_text(config_text(config, bos, dtype), encoding="utf-8")
        ids = {"bos_token_id": bos, "eos_token_id": bos, "pad_token_id": bos}
        generation = json.dumps(ids, indent=2) + "\n"
        (folder / "generation_config.json").write_text(generation, encoding="utf-8")
        shutil.copyfile(MODELLING, folder / MODELLING.name)
        if tokenizer:
            save_tokenizer(folder, tokenizer, config.sequence_len)
