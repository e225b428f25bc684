"""The old name of `python -m train.data train-tokenizer`."""

import runpy
import sys

if __name__ == "__main__":
    print("train.tokenizer is now called train.data train-tokenizer", file=sys.stderr)
    sys.argv.insert(1, "train-tokenizer")
    runpy.run_module("nanofuse.train.data", run_name="__main__")
