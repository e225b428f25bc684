"""The data command.

python -m train.data download -n 8       ClimbMix shards from the Hugging Face hub
python -m train.data info                what is there
python -m train.data train-tokenizer     a BPE tokenizer of --data, kept beside its shards
python -m train.data tokenize            tokens of all shards, kept beside them for training
python -m train.data digest              which data these are: a digest of texts and tokenizer

torch is loaded once the flags are parsed.
"""

import contextlib
import os
import time

from tqdm import tqdm

from nanofuse.train.command import CommandParser, add_data_argument, not_empty, run_command
from nanofuse.train.data.download import LAST_SHARD, download_shards
from nanofuse.train.data.tokenizer import DOC_CAP, MAX_TRAINING_CHARS, train_on_corpus
from nanofuse.train.errors import UserError
from nanofuse.train.flags import whole

MAX_WORKERS = 64


def open_data(args):
    """The corpus of a command's flags."""
    from nanofuse.train.data.corpus import TEXT_COLUMN, open_corpus

    return open_corpus(args.data, args.text_column or TEXT_COLUMN, args.val_shard or "")


def tokenizer_and_cache(args, corpus):
    """(Tokenizer, TokenCache) of a command's flags.

    Raises:
        UserError: there is no tokenizer, or --cache is off.
    """
    from nanofuse.train.data.tokenizer import Tokenizer
    from nanofuse.train.data.tokens import open_cache

    if args.cache == "off":
        raise UserError("--cache off: this command needs a cache; name a folder, or drop the flag")
    tokenizer = Tokenizer.load(corpus.tokenizer_path)
    return tokenizer, open_cache(corpus, tokenizer, args.cache or "")


def cached_words(cache, corpus, shard):
    """What is cached of a shard, in words, or ''."""
    if (cached := cache.open(shard)) is None:
        return ""
    with contextlib.closing(cached):
        try:
            words = f"  {cached.num_tokens():,} tokens cached"
        except ValueError:  # damaged, and gone
            return ""
        if not cached.complete:
            words += f", of {cached.num_groups:,} of {corpus.num_groups(shard):,} row groups"
        return words


def info(args):
    """Print what --data holds: row groups or files per split; documents, bytes and cached tokens
    per shard."""
    from nanofuse.train.data.corpus import SPLITS, ParquetCorpus

    corpus = open_data(args)
    print(f"data: {corpus.name}")
    parquet = isinstance(corpus, ParquetCorpus)
    for split in SPLITS:
        count = corpus.num_units(split) if parquet else len(corpus.files[split])
        what = ("row group" if parquet else "file") + ("s" if count > 1 else "")
        validates = f" ({corpus.validation})" if parquet and split == "val" else ""
        print(f"{split}: {count:,} {what}{validates}")
    if parquet:
        tokenizer = corpus.tokenizer_path
        cache = tokenizer_and_cache(args, corpus)[1] if tokenizer.exists() else None
        for shard, path in enumerate(corpus.shards):
            sizes = f"{corpus.documents[shard]:>9,} documents  {path.stat().st_size:>13,} bytes"
            words = cached_words(cache, corpus, shard) if cache else ""
            print(f"  {path.name}  {sizes}{words}")
        print(f"tokenizer: {tokenizer if cache else 'none yet'}")
    for hint in corpus.hints:
        print(f"data: {hint}")


def download(args):
    for flag, value, most in (
        ("-n", args.num_shards, LAST_SHARD),
        ("--workers", args.workers, MAX_WORKERS),
    ):
        if not 1 <= value <= most:
            bound = "at least 1" if value < 1 else f"at most {most:,}"
            raise UserError(f"{flag} {value} must be {bound}")
    from nanofuse.train.data.corpus import data_directory

    directory = data_directory(args.data)
    paths = download_shards(directory, args.num_shards, args.workers)
    print(f"{len(paths)} shards in {directory}")


def train_tokenizer(args):
    """Train a tokenizer on --data and write it beside the shards."""
    corpus = open_data(args)
    path = corpus.tokenizer_path
    if path is None:
        raise UserError("--data names no folder to keep a tokenizer in; pass --data DIR")
    if not os.access(path.parent, os.W_OK):  # before minutes of training
        raise UserError(f"{path} cannot be written; copy or link the data to a folder that can be")
    with tqdm(unit=" characters", unit_scale=True, disable=None, leave=False) as bar:
        tokenizer = train_on_corpus(
            corpus, args.vocab_size, args.max_chars, args.doc_cap, bar.update
        )
    place = ", in place of the one that was there (runs keep their own)" if path.exists() else ""
    tokenizer.save(path)
    print(f"tokenizer of {tokenizer.vocab_size:,} tokens written to {path}{place}")
    if tokenizer.shortfall:
        print(f"tokenizer: {tokenizer.shortfall}")
    if line := corpus.tell_replaced():
        print(line)


def tokenize(args):
    """Write the token caches of all shards that are not complete."""
    from nanofuse.train.data.encode import fill_cache, used_shards

    corpus = open_data(args)
    if corpus.tokenizer_path is None:
        raise UserError("the standard library has no shards to tokenize; name some with --data")
    tokenizer, cache = tokenizer_and_cache(args, corpus)
    total, began = sum(map(corpus.num_groups, used_shards(corpus))), time.perf_counter()
    with tqdm(total=total, unit=" row groups", disable=None, leave=False) as bar:
        shards, tokens = fill_cache(corpus, tokenizer, cache, args.workers, bar.update)
    if shards:
        rate = tokens / (time.perf_counter() - began)
        print(f"{tokens:,} tokens of {shards} shards written, {rate:,.0f} tokens/s")
    else:
        print("nothing to do")
    print(f"the tokens of all shards are in {cache.where(0)}")
    if line := corpus.tell_replaced():
        print(line)


def digest(args):
    """Print the digest of --data and its tokenizer, by which a sweep's file names its data."""
    from nanofuse.train.data.digest import data_digest
    from nanofuse.train.data.tokenizer import Tokenizer

    corpus = open_data(args)
    if corpus.tokenizer_path is None:
        raise UserError("the standard library is another on every machine; name --data")
    print(data_digest(corpus, Tokenizer.load(corpus.tokenizer_path).fingerprint))


def main(argv=None):
    parser = CommandParser(prog="python -m train.data", description="The data command.")
    commands = parser.add_subparsers(required=True, parser_class=CommandParser)
    fetch = commands.add_parser("download", help="fetch ClimbMix shards from the hub")
    fetch.add_argument("-n", "--num-shards", type=int, default=8, help="training shards to fetch")
    fetch.add_argument("--workers", type=int, default=4, help="shards fetched at a time")
    fetch.set_defaults(call=download)
    show = commands.add_parser("info", help="print what is there")
    show.set_defaults(call=info)
    train = commands.add_parser("train-tokenizer", help="train a BPE tokenizer on --data")
    train.add_argument("--vocab-size", type=int, default=32768, help="tokens, specials included")
    for flag, default, text in (
        ("--max-chars", MAX_TRAINING_CHARS, "characters to train on; the last document is whole"),
        ("--doc-cap", DOC_CAP, "characters of a document that count"),
    ):
        help_text = f"{text} [{default:,}]"
        train.add_argument(flag, type=whole(1, 2**53), default=default, metavar="N", help=help_text)
    train.set_defaults(call=train_tokenizer)
    encode = commands.add_parser("tokenize", help="write the tokens of all shards of --data")
    encode.add_argument("--workers", metavar="N", type=whole(1, 1024), help="threads [all cores]")
    encode.set_defaults(call=tokenize)
    name = commands.add_parser("digest", help="print a digest of texts and tokenizer")
    name.set_defaults(call=digest)
    for command in (fetch, show, train, encode, name):
        add_data_argument(command)
    where = "folder for the tokens [.tokens beside the shards]"
    for command in (show, encode):
        command.add_argument("--cache", metavar="DIR", type=not_empty, help=where)
    for command in (show, train, encode, name):
        for flag, metavar, text in (
            ("--val-shard", "FILE", "shard that validates (default: val*, test* or the last)"),
            ("--text-column", "NAME", "column that holds the text [text]"),
        ):
            command.add_argument(flag, metavar=metavar, type=not_empty, help=text)
    args = parser.parse_args(argv)
    args.call(args)


if __name__ == "__main__":
    run_command(main)
