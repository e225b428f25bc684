"""A run's checkpoint, written for other programs."""

from nanofuse.train.checkpoint import config_of, load_tensors, load_tokenizer
from nanofuse.train.data.tokenizer import FILE_NAME
from nanofuse.train.hugging_face import to_hugging_face
from nanofuse.train.nanochat import to_nanochat
from nanofuse.train.run_folder import MODEL, load_meta


def _read(directory, folder):
    """(meta, GPTConfig, {name: tensor}, Tokenizer or None) of a checkpoint.

    Args:
        directory: the run's folder.
        folder: the checkpoint's.
    """
    meta = load_meta(folder)
    config = config_of(meta, folder)
    kept = (directory / FILE_NAME).exists()
    tokenizer = load_tokenizer(directory, config, meta) if kept else None
    return meta, config, load_tensors(folder / MODEL), tokenizer


def export_nanochat(directory, folder, target):
    """Write a checkpoint in nanochat's format and say where."""
    meta, config, tensors, tokenizer = _read(directory, folder)
    step = meta["step"]
    place = to_nanochat(target, config, step, meta.get("val_bpb"), tensors, tokenizer)
    print(f"{target}: step {step} in nanochat's format")
    print(f"tokenizer: {place or 'none, as the run has none'}")


def export_hugging_face(directory, folder, target, dtype):
    """Write a checkpoint for Hugging Face's transformers and say where.

    Args:
        dtype: of the weights, a name of train.hugging_face.DTYPES.
    """
    meta, config, tensors, tokenizer = _read(directory, folder)
    to_hugging_face(target, config, tensors, tokenizer, dtype)
    print(
        f"{target}: step {meta['step']} for transformers, {dtype}; load it with "
        "trust_remote_code=True"
    )
    print(f"tokenizer: {target if tokenizer else 'none, as the run has none'}")
