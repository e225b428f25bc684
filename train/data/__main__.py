"""The data command.

python -m train.data download -n 8       ClimbMix shards from the Hugging Face hub
python -m train.data info                what is there
python -m train.data train-tokenizer     a BPE tokenizer of --data, kept beside its shards
"""

from nanofuse.train.command import CommandParser, add_data_argument, run_command
from nanofuse.train.data.corpus import SPLITS, ParquetCorpus, data_directory, open_corpus
from nanofuse.train.data.download import download_shards
from nanofuse.train.data.tokenizer import FILE_NAME, train_on_corpus
from nanofuse.train.errors import UserError


def info(args):
    """Print what --data holds: shards, documents, row groups and bytes per split."""
    corpus = open_corpus(args.data)
    print(f"data: {corpus.name}")
    for split in SPLITS:
        print(f"{split}: {corpus.num_units(split)} units")
    if isinstance(corpus, ParquetCorpus):
        for path, documents in zip(corpus.shards, corpus.documents, strict=True):
            print(f"  {path.name}  {documents:>9,} documents  {path.stat().st_size:>13,} bytes")
        tokenizer = corpus.directory / FILE_NAME
        print(f"tokenizer: {tokenizer if tokenizer.exists() else 'none yet'}")


def download(args):
    if args.num_shards < 1:
        raise UserError(f"-n {args.num_shards} must be at least 1")
    paths = download_shards(data_directory(args.data), args.num_shards, args.workers)
    print(f"{len(paths)} shards in {data_directory(args.data)}")


def train_tokenizer(args):
    """Train a tokenizer on --data and write it beside the shards."""
    corpus = open_corpus(args.data)
    if corpus.directory is None:
        raise UserError("--data names no folder to keep a tokenizer in; pass --data DIR")
    path = corpus.directory / FILE_NAME
    tokenizer = train_on_corpus(corpus, args.vocab_size)
    tokenizer.save(path)
    print(f"tokenizer of {tokenizer.vocab_size:,} tokens written to {path}")


def main(argv=None):
    parser = CommandParser(prog="python -m train.data", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser)
    fetch = commands.add_parser("download", help="fetch ClimbMix shards from the hub")
    fetch.add_argument("-n", "--num-shards", type=int, default=8, help="training shards to fetch")
    fetch.add_argument("--workers", type=int, default=4, help="shards fetched at a time")
    fetch.set_defaults(call=download)
    show = commands.add_parser("info", help="print what is there")
    show.set_defaults(call=info)
    train = commands.add_parser("train-tokenizer", help="train a BPE tokenizer on --data")
    train.add_argument("--vocab-size", type=int, default=32768, help="tokens, specials included")
    train.set_defaults(call=train_tokenizer)
    for command in (fetch, show, train):
        add_data_argument(command)
    args = parser.parse_args(argv)
    args.call(args)


if __name__ == "__main__":
    run_command(main)
