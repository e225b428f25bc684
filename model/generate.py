"""The old name of `python -m train.generate`."""

import runpy
import sys

if __name__ == "__main__":
    print("model.generate is now called train.generate", file=sys.stderr)
    runpy.run_module("nanofuse.train.generate", run_name="__main__")
