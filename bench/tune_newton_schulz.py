"""Tile configurations of the Newton-Schulz products: python -m bench.tune_newton_schulz

Per product and configuration: microseconds and TFLOP/s (symmetric results counted by half), and
cuBLAS on the same product in full. Last: newton_schulz by stack against the reference.
"""

from functools import partial

import torch

from bench.bench_newton_schulz import D16, iteration_flops
from bench.harness import ON_GPU, compiled, median_seconds
from kernels.newton_schulz import newton_schulz, newton_schulz_ref
from kernels.symmetric_matmul import MatmulTile, batched_matmul, symmetric_matmul

CONFIGS = [
    MatmulTile(rows, cols, depth, warps, stages, persistent)
    for rows, cols, depth, warps, stages, persistent in [
        (128, 128, 64, 4, 3, 0),
        (128, 128, 64, 8, 3, 0),
        (128, 128, 64, 8, 4, 0),
        (128, 128, 128, 8, 2, 0),
        (128, 256, 64, 8, 3, 0),
        (128, 256, 64, 8, 4, 0),
        (256, 128, 64, 8, 4, 0),
        (64, 128, 64, 4, 4, 0),
        (64, 256, 64, 4, 3, 0),
        (128, 128, 64, 8, 3, 1),
        (128, 256, 64, 8, 3, 1),
        (256, 128, 64, 8, 3, 1),
    ]
]


def products(shape):
    """(name, FLOPs, function of a config, cuBLAS function) of every product on a stack."""
    n, rows, cols = shape
    tall, small = rows > cols, min(rows, cols)
    x = (torch.randn(shape, device="cuda") / cols**0.5).half()
    scale = torch.full((n,), 0.03, device="cuda")
    gram = symmetric_matmul(x, transpose=tall, scale=scale)
    poly = symmetric_matmul(gram, factor=2.0, addend=gram, beta=-2.0, diagonal=4.0)
    operands = (x, poly) if tall else (poly, x)
    flops, square = n * rows * cols * small, n * small**3
    yield (
        "gram",
        flops,
        lambda config: symmetric_matmul(x, transpose=tall, scale=scale, config=config),
        lambda: x.mT @ x if tall else x @ x.mT,
    )
    yield (
        "poly",
        square,
        lambda config: symmetric_matmul(
            gram, factor=2.0, addend=gram, beta=-2.0, diagonal=4.0, config=config
        ),
        lambda: torch.baddbmm(gram, gram, gram, beta=-2.0, alpha=2.0),
    )
    yield (
        "product",
        square,
        lambda config: symmetric_matmul(poly, gram, config=config),
        lambda: poly @ gram,
    )
    yield (
        "update",
        2 * flops,
        lambda config: batched_matmul(*operands, config=config),
        lambda: operands[0] @ operands[1],
    )
    yield (
        "last update",
        2 * flops,
        lambda config: batched_matmul(
            *operands,
            scale=scale,
            sums="row" if rows >= cols else "col",
            out_dtype=torch.bfloat16,
            config=config,
        ),
        lambda: operands[0] @ operands[1],
    )


def report(name, seconds, flops):
    print(
        f"    {name:72s} {1e6 * seconds:9.1f} us {flops / seconds / 1e12:7.1f} TFLOP/s", flush=True
    )


def time_products(shape, rounds=8):
    print(f"{shape}")
    for name, flops, run, cublas in products(shape):
        print(f"  {name}")
        report("cuBLAS, full product", median_seconds(cublas, rounds), flops)
        expected = run(None)
        for config in CONFIGS:
            if "update" not in name and config.cols not in (config.rows, 2 * config.rows):
                continue
            try:
                torch.testing.assert_close(run(config), expected, rtol=2e-2, atol=2e-2)
                report(str(config), median_seconds(lambda f=run, c=config: f(c), rounds), flops)
            except Exception as error:  # a configuration may exceed the GPU's shared memory
                print(f"    {str(config):72s} {type(error).__name__}: {str(error)[:60]}")


def time_newton_schulz(rounds=10):
    for shapes in [[shape] for shape in D16] + [D16]:
        stacks = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]
        functions = {
            "kernels": newton_schulz,
            "kernels, plain iteration": partial(newton_schulz, gram=False),
            "eager": newton_schulz_ref,
            "compile": compiled(newton_schulz_ref),
        }
        print(shapes)
        for name, function in functions.items():
            seconds = median_seconds(lambda f=function, s=stacks: [f(x) for x in s], rounds)
            report(name, seconds, sum(map(iteration_flops, shapes)))


def main():
    if not ON_GPU:
        raise SystemExit("tuning needs a GPU")
    print(torch.cuda.get_device_name())
    for shape in D16:
        time_products(shape)
    time_newton_schulz()


if __name__ == "__main__":
    main()
