#!/usr/bin/env bash
# The GPU jobs that dev/LOG.md has as due next, in two calls of at most 10 minutes on a machine with two GPUs:
#
#     bash dev/next.sh 1|2 OUT SECONDS ARCHIVE
#
# The data (five training shards, the last validates) and tokenizer.json lie in $DATA, an absolute path, libraries on
# PYTHONPATH. SECONDS lie 40 below the call's own limit, which is what is left of the session's device time if that
# is less than its timeout. OUT must not exist; ARCHIVE lies in the folder that comes back (dev/queue.sh). What was
# compiled comes back beside it, in parts ARCHIVE.caches.aa and so on: a later call finds them by CACHES, the name
# without the last two letters, and starts in seconds.
set -u
if [ $# != 4 ] || ! [[ $1 =~ ^[12]$ ]] || [ -e "$2" ]; then
  echo "error: usage: dev/next.sh 1|2 OUT SECONDS ARCHIVE, with an OUT that does not exist" >&2
  exit 2
fi
call=$1 out=$(realpath -m "$2") seconds=$3 archive=$(realpath -m "$4")
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

three=/tmp/three # the data of records/2026-11-25-h100, whose fused d16 run compares
mkdir -p "$three"
ln -sf "$DATA"/shard_0000[0125].parquet "$DATA/tokenizer.json" "$three"

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
began=$SECONDS
queue() { "$(dirname "$0")/queue.sh" "$out" $((seconds - SECONDS + began)) "$archive"; }
d8="--depth 8 --num-iterations 330 --eval-every 110" # within one epoch of five shards
d4="--depth 4 --num-iterations 20 --eval-every 5 --fp8 off"
rate="--bigram-embedding-lr-mult"
case $call in
  1) # the compiled run takes one GPU for the whole call, 464 s the last time
    queue << END
480 560 d16-compiled-fp8 $(data=$three train d16-compiled-fp8 --depth 16 --num-iterations 150 --eval-every 50 --backend compile --skip-initial-eval)
20 60 tune-early $(copy early) && git apply records/2026-11-25-step/early.patch && python3 -m bench.tune linear_relu_squared_bwd_bf16 linear_relu_squared_bwd && cp kernels/tuned.json $out
25 100 d4-fused-bf16 $(train d4-fused-bf16 $d4)
30 60 d4-eager-bf16 $(train d4-eager-bf16 $d4 --backend eager)
30 60 profile-d16-bf16-early cd /tmp/early && python3 -m bench.profile --depth 16 --fp8 off --out $out/profile-d16-bf16-early
30 60 profile-d16-bf16 python3 -m bench.profile --depth 16 --fp8 off --out $out/profile-d16-bf16
30 60 d4-fused-fp8 $(train d4-fused-fp8 --depth 4 --num-iterations 300 --eval-every 150)
80 130 d8-e4m3 $(copy e4m3) && sed -i s/E5M2/E4M3/ model/fused.py && $(train d8-e4m3 $d8)
165 220 bench-d16-bf16 cd /tmp/early && $(bench d16-bf16 --depth 16 --fp8 off --no-cuda-graphs)
30 60 bench-mlp python3 -m pytest bench/bench_linear_relu_squared.py --benchmark-only -q --benchmark-json $out/mlp.json
END
    ;;
  2) # the baseline of d4 waits for its launches: nothing beside it
    queue << END
80 120 bench-d4 $(bench d4 --depth 4)
END
    queue << END
200 320 bench-d16 $(bench d16 --depth 16 --no-cuda-graphs)
200 320 bench-d12 $(bench d12 --depth 12)
230 330 bench-d20 $(bench d20 --depth 20 --device-batch-size 16 --no-cuda-graphs)
85 120 d8-bigram-rate-0.5 $(train d8-bigram-rate-0.5 $d8 $rate 0.5)
85 120 d8-bigram-rate-2 $(train d8-bigram-rate-2 $d8 $rate 2)
END
    ;;
esac
tar c -C /tmp caches | xz -T0 -3 | split -b 15M - "$archive.caches."
