"""The old name of bench.step_profile: `python -m bench.profile` still runs it.

A script of this folder that is run as a file finds this module before the standard library's
`profile`, which cProfile imports, and is given that one.
"""

import importlib.util
import runpy
import sys
import sysconfig
from pathlib import Path

if __name__ == "__main__":
    print("bench.profile is now called bench.step_profile", file=sys.stderr)
    runpy.run_module("nanofuse.bench.step_profile", run_name="__main__")
elif __name__ == "profile":
    path = Path(sysconfig.get_path("stdlib"), "profile.py")
    spec = importlib.util.spec_from_file_location(__name__, path)
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
