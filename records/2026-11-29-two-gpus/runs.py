"""Ranks on real GPUs: speed at 1 and 2, and how runs end. Run in the repository's root:

    python3 /tmp/ranks_gpu.py [--gpus 2] [flags of train.run in place of the default ones]

Prints a table; about two minutes with cold kernel caches, one with warm ones. In it: speed-up, BPB
beside one GPU's (must: within 0.002), exposed ms (must at d16: 4), skew, memory of the fullest GPU
(must at d8 and deeper: below one GPU's), FP8 and bf16, a run of N resumed by 1, --deterministic
twice (must: equal bits), and signals. --quick leaves the signals out. First, alone on one GPU,
tests of the order of hidden transfers:  python3 -m pytest tests/model/test_beside.py -m cuda
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

FLAGS = (
    "--depth 4 --device-batch-size 16 --total-batch-size 524288 --eval-every -1 --eval-tokens 131072 "
    "--skip-initial-eval --sample-every -1 --data stdlib --vocab-size 8192 --train-log-every 10"
).split()
argv = sys.argv[1:]
world = argv[argv.index("--gpus") + 1] if "--gpus" in argv else "2"
if "--gpus" in argv:
    at = argv.index("--gpus")
    del argv[at : at + 2]
quick = "--quick" in argv
argv = [flag for flag in argv if flag != "--quick"]
FLAGS = argv or FLAGS
RUN = [sys.executable, "-m", "nanofuse.train.run", *FLAGS]
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}


def fresh(name):
    shutil.rmtree(f"runs/{name}", ignore_errors=True)
    return ["--run", name]


def records(name, kind="train"):
    path = Path(f"runs/{name}/metrics.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def whole(name, command):
    began = time.time()
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    seconds = time.time() - began
    if done.returncode:
        print(f"{name}: code {done.returncode}\n{done.stderr[-2000:]}")
        return None
    run = command[command.index("--run") + 1]
    s, last = json.loads(done.stdout.splitlines()[-1]), records(run)[-1]
    print(
        f"{name:10} {s['ms_per_step']:8.2f} ms/step  first step {s['time_to_first_step_s']:.1f} s  "
        f"whole {seconds:.1f} s  loss {s['loss']:.6f}  bpb {s['val_bpb']:.6f}  peak {s['peak_gib']}"
        f"  skew {last.get('skew')}  exposed ms {last.get('exposed_ms')}  saved {sorted(p.name for p in Path(f'runs/{run}').glob('step_*'))}"
    )
    return s


steps = ["--num-iterations", "60"]
one = whole("g1", [*RUN, *steps, *fresh("g1")])
two = whole("gN", [*RUN, *steps, *fresh("gN"), "--gpus", world])
torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
whole("torchrun", [*torchrun, "-m", "nanofuse.train.run", "--", *FLAGS, *steps, *fresh("torchrun")])
if one and two:
    print(f"speed-up {one['ms_per_step'] / two['ms_per_step']:.3f}, "
          f"bpb differs by {abs(one['val_bpb'] - two['val_bpb']):.6f}")
    a, b = ({r["step"]: r["loss"] for r in records(n)} for n in ("g1", "gN"))
    print("largest difference of a loss", max(abs(a[s] - b[s]) for s in a if s in b))

if two:
    whole("gN->1", [*RUN[:3], "--run", "gN", "--resume", "--gpus", "1", "--num-iterations", "62"])
    print(f"memory of the fullest: {one['peak_gib']:.2f} GiB on one, {two['peak_gib']:.2f} on {world}: "
          f"{'below' if two['peak_gib'] < one['peak_gib'] else 'NOT below'}")
bf16 = whole("bf16 1", [*RUN, *steps, "--fp8", "off", *fresh("b1")])
bf16s = whole("bf16 N", [*RUN, *steps, "--fp8", "off", *fresh("bN"), "--gpus", world])
if bf16 and bf16s:
    print(f"bf16: speed-up {bf16['ms_per_step'] / bf16s['ms_per_step']:.3f}, "
          f"bpb differs by {abs(bf16['val_bpb'] - bf16s['val_bpb']):.6f}")
few = ["--num-iterations", "20", "--deterministic", "--gpus", world]
for name in ("d1", "d2"):
    whole(name, [*RUN, *few, *fresh(name)])
sums = [hashlib.sha256(Path(f"runs/{n}/step_000020/model.safetensors").read_bytes()).hexdigest()[:16]
        for n in ("d1", "d2") if Path(f"runs/{n}/step_000020/model.safetensors").exists()]
print("deterministic twice:", sums, "EQUAL" if len(set(sums)) == 1 and len(sums) == 2 else "DIFFER")

for name, number, who in () if quick else (
    ("SIGTERM", signal.SIGTERM, "parent"), ("SIGINT", signal.SIGINT, "parent"),
    ("SIGKILL", signal.SIGKILL, 1), ("SIGSTOP", signal.SIGSTOP, 1), ("SIGSTOP0", signal.SIGSTOP, 0),
):
    command = [*RUN, "--num-iterations", "1000000", *fresh(name), "--gpus", world]
    parent = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.time() + 120
    while len(records(name)) < 4 and time.time() < until and parent.poll() is None:
        time.sleep(0.1)
    time.sleep(0.5)
    pid = parent.pid
    if who != "parent":
        out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
        for child in map(int, out.stdout.split()):
            env = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"RANK={who}".encode() in env:
                pid = child
    began = time.time()
    os.kill(pid, number)
    _, err = parent.communicate()
    saved = sorted(p.name for p in Path(f"runs/{name}").glob("step_*"))
    print(f"{name:9} code {parent.returncode} after {time.time() - began:.1f} s, saved {saved}")
    print("    " + "\n    ".join(line[:220] for line in err.splitlines()[-6:]))
