#!/usr/bin/env bash
# The GPU jobs that dev/LOG.md has as due next, in a call of at most 10 minutes on a machine with two GPUs:
#
#     bash dev/next.sh OUT SECONDS ARCHIVE
#
# The data (five training shards, the last validates) and tokenizer.json lie in $DATA, an absolute path, libraries on
# PYTHONPATH. SECONDS lie 40 below the call's own limit, which is what is left of the session's device time if that
# is less than its timeout. OUT must not exist; ARCHIVE lies in the folder that comes back (dev/queue.sh). What was
# compiled comes back beside it, in parts ARCHIVE.caches.aa and so on: a later call finds them by CACHES, the name
# without the last two letters, and starts in seconds.
set -u
if [ $# != 3 ] || [ -e "$1" ]; then
  echo "error: usage: dev/next.sh OUT SECONDS ARCHIVE, with an OUT that does not exist" >&2
  exit 2
fi
out=$(realpath -m "$1") seconds=$2 archive=$(realpath -m "$3")
: "${DATA:?export DATA, the folder of the shards}"
export TORCHINDUCTOR_COMPILE_THREADS=16 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
unset PYTHONDONTWRITEBYTECODE # a warm disk holds bytecode, too
export PYTHONPYCACHEPREFIX=/tmp/pyc
export TRITON_CACHE_DIR=/tmp/caches/triton TORCHINDUCTOR_CACHE_DIR=/tmp/caches/inductor
export FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=/tmp/caches/fa4
mkdir -p "$out" /tmp/caches
[ -z "${CACHES:-}" ] || cat "$CACHES".* | tar xJ -C /tmp
nvidia-smi --query-gpu=name,driver_version,power.limit --format=csv,noheader > "$out/env.txt"
nvidia-smi --query-gpu=timestamp,index,clocks.sm,power.draw --format=csv,noheader -l 2 > "$out/clocks.csv" &
trap 'kill %1' EXIT

train() { # name flags...
  echo "rm -rf runs/$1; python3 -m train.run --run $1 --data ${data:-$DATA} --eval-tokens 2097152" \
    "--sample-every -1 --train-log-every 10 ${*:2}"
}
bench() { # name flags...
  echo "python3 -m pytest bench/bench_step.py --benchmark-only -q --rounds 20 --baselines auto" \
    "--benchmark-json $out/$1.json ${*:2}"
}
copy() { # name: into a copy of this tree, whose runs are ours
  echo "rm -rf /tmp/$1 && cp -r . /tmp/$1 && rm -rf /tmp/$1/runs && ln -s $PWD/runs /tmp/$1 && cd /tmp/$1"
}
d4="--depth 4 --num-iterations 20 --eval-every 5 --fp8 off --save-every -1"
d16="--depth 16 --num-iterations 30 --skip-initial-eval --eval-every -1 --save-every -1"
"$(dirname "$0")/queue.sh" "$out" "$seconds" "$archive" << END
400 520 bench-d20 $(bench d20 --depth 20 --device-batch-size 16 --no-cuda-graphs)
20 90 tune $(copy tuned) && python3 -m bench.tune linear_relu_squared_bf16 linear_relu_squared_bwd_bf16 && cp kernels/tuned.json $out
30 90 tests-tuned cd /tmp/tuned && python3 -m pytest tests/kernels/test_linear_relu_squared.py tests/kernels/test_tuning.py -q -n 8
40 120 d4-eager-fp32 $(copy fp32) && sed -i 's/torch.bfloat16 if cuda/torch.float32 if cuda/' train/device.py && sed -i 's/precision("high")/precision("highest")/' train/assemble.py && $(train d4-eager-fp32 $d4 --backend eager --attention sdpa --device-batch-size 8)
40 90 d4-fused-bf16 $(train d4-fused-bf16 $d4)
30 90 d4-eager-bf16 $(train d4-eager-bf16 $d4 --backend eager)
140 200 bench-d16-bf16 cd /tmp/tuned && $(bench d16-bf16 --depth 16 --fp8 off --no-cuda-graphs)
15 60 profile-d16-bf16 cd /tmp/tuned && python3 -m bench.profile --depth 16 --fp8 off --out $out/profile-d16-bf16
15 60 profile-d16-fp8 python3 -m bench.profile --depth 16 --out $out/profile-d16-fp8
50 70 d16-dense $(train d16-dense $d16 --bigram-embed-factor 0)
50 70 d16-bigram $(train d16-bigram $d16)
END
tar c -C /tmp caches | xz -T0 -3 | split -b 15M - "$archive.caches."
