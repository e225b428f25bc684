"""Compiles the kernels of a run for a GPU that need not be here, into a file.

python -m train.warm [--arch sm_90] [--gpu NAME] [--depth 16] [--fp8 off] ... [--out FILE]

Takes the flags of train.run; those of the model, the batch, the optimiser and the machine count.
`python -m train.run --kernel-cache FILE` starts with it. It has to be made by the versions of
Python, Triton and FlashAttention 4 that will use it; torch may be another, without CUDA. Where a
run has measured which algorithms of products are fastest on such a GPU, the file says that too.
"""

import os
import tempfile
import time
from pathlib import Path

from nanofuse.model.providers import in_fp8
from nanofuse.train.command import not_empty, run_command
from nanofuse.train.compiling import Compiling, Request
from nanofuse.train.disk import in_units
from nanofuse.train.errors import UserError
from nanofuse.train.launch import number_of_ranks
from nanofuse.train.settings import AUTO, asks_for_rows, build_parser, naming_flags, resolve

# Of an architecture: compute capability, and GPUs by the name that the driver gives them, with
# their streaming multiprocessors.
GPUS = {
    "sm_90": ((9, 0), {"NVIDIA H200": 132, "NVIDIA H100 80GB HBM3": 132, "NVIDIA H100 PCIe": 114})
}


def parse(argv):
    """The values of this command's own flags, and {name: value} of those of train.run given."""
    parser = build_parser()
    parser.prog = "python -m train.warm"
    parser.description, parser.epilog = (__doc__ or "").partition("\n")[0], None
    own = parser.add_argument_group("compilation")
    own.add_argument("--arch", choices=sorted(GPUS), default="sm_90", help="of the GPU [sm_90]")
    own.add_argument("--gpu", metavar="NAME", help="whose tuned tiles [the first of the arch]")
    own.add_argument("--out", type=not_empty, metavar="FILE", help="[kernels-dDEPTH-ARCH.zip]")
    given = vars(parser.parse_args(argv))
    return {name: given.pop(name) for name in ("arch", "gpu", "out")}, given


def main(argv=None):
    own, given = parse(argv)
    capability, gpus = GPUS[own["arch"]]
    name = own["gpu"] or next(iter(gpus))
    if name not in gpus:
        raise UserError(f"--gpu {name} is not known; choose from {', '.join(gpus)}")
    if asks_for_rows(given):
        raise UserError(
            "--device-batch-size auto is found out on the GPU; give the rows that a run there takes"
        )
    settings = resolve(given, "cuda")
    if settings.machine.gpus == AUTO:
        raise UserError("--gpus auto is found out on the machine; give the number that there are")
    number_of_ranks(settings.machine.gpus, "cpu")  # refuses what is none
    with naming_flags():
        config = settings.model.config()
    out = Path(own["out"] or f"kernels-d{settings.model.depth}-{own['arch']}.zip")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file in it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: no such folder")
    if not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: its folder cannot be written to; name another file")
    with tempfile.TemporaryDirectory() as folder:
        # read by Triton and FlashAttention 4 in this process, which packs, and in the compiling one
        os.environ["TRITON_CACHE_DIR"] = str(Path(folder, "triton"))
        os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] = str(Path(folder, "flash"))
        began = time.perf_counter()
        compiling = Compiling.start()
        try:
            size, count = compile_and_pack(
                compiling, settings, config, (name, capability, gpus[name]), out
            )
        finally:
            compiling.close()
    print(f"{out}: {count} kernels, {in_units(size)}, {time.perf_counter() - began:.1f} s")


def compile_and_pack(compiling, settings, config, gpu, out):
    """Write the file `out`; returns its bytes and the number of kernels.

    Args:
        gpu: its name, compute capability and streaming multiprocessors.

    Raises:
        UserError: a kernel that does not compile, or no Triton.
    """
    from nanofuse.kernels.common.jit import HAS_TRITON

    if not HAS_TRITON:
        raise UserError(
            "train.warm needs Triton, which is not installed (Linux: pip install triton)"
        )
    from nanofuse.model.backends import flash_ahead
    from nanofuse.model.fused import fp8_fits
    from nanofuse.train.kernel_cache import conditions, measured_products, pack

    rows, machine = settings.horizon.device_batch_size, settings.machine
    fits = fp8_fits(config, rows * config.sequence_len)
    if not fits and in_fp8(machine.fp8) and machine.fp8 != "auto":
        raise UserError(f"--fp8 {machine.fp8} does not fit these sizes; use --fp8 off")
    request = Request.of(
        config,
        settings.optim,
        rows,
        fits and in_fp8(machine.fp8),
        flash_ahead.expected(machine.attention),
        machine.deterministic,
        *gpu,
        world=int(machine.gpus),
        gradients=machine.fp8_gradients,
    )
    compiling.ask(request)
    compiling.wait()
    if compiling.problem:
        raise UserError(f"not every kernel compiled: {compiling.problem}")
    entries = list(dict.fromkeys(compiling.entries))
    products = measured_products(gpu[0])
    if choices := sum(map(len, products.values())):
        print(f"products: {choices} choices measured on {gpu[0]} go into the file")
    return pack(out, conditions(gpu[1]), request, entries, products), compiling.found


if __name__ == "__main__":
    run_command(main)
