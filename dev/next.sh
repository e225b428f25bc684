#!/usr/bin/env bash
# The GPU jobs that dev/LOG.md has as due next, in two calls of at most 10 minutes on a machine with two GPUs:
#
#     bash dev/next.sh 1|2 OUT SECONDS ARCHIVE
#
# SECONDS lie 30 below the call's own limit, which is what is left of the session's device time if that is less than
# its timeout; ARCHIVE is a .tgz in the folder that comes back (see dev/queue.sh).
#
# The data (five training shards, the last validates) and tokenizer.json lie in $DATA, libraries on PYTHONPATH.
set -u
[ $# = 4 ] || { echo "error: usage: dev/next.sh 1|2 OUT SECONDS ARCHIVE" >&2; exit 2; }
call=$1 out=$(realpath -m "$2") seconds=$3 archive=$(realpath -m "$4")
: "${DATA:?export DATA, the folder of the shards}"
export TORCHINDUCTOR_COMPILE_THREADS=16 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
unset PYTHONDONTWRITEBYTECODE # a warm disk holds bytecode, too
export PYTHONPYCACHEPREFIX=/tmp/pyc
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,power.limit --format=csv,noheader > "$out/env.txt"
nvidia-smi --query-gpu=timestamp,index,clocks.sm,power.draw --format=csv,noheader -l 2 > "$out/clocks-$call.csv" &
trap 'kill %1' EXIT

three=/tmp/three # the data of records/2026-11-25-h100, whose fused d16 run compares
mkdir -p "$three"
ln -sf "$DATA"/shard_0000[0125].parquet "$DATA/tokenizer.json" "$three"

train() { # name flags...
  echo "trap 'cp runs/$1/metrics.jsonl $out/$1.jsonl; rm -rf runs/$1' EXIT; python3 -m train.run --run $1" \
    "--data ${data:-$DATA} --eval-tokens 2097152 --sample-every -1 --train-log-every 10 ${*:2}"
}
bench() { # name flags...
  echo "python3 -m pytest bench/bench_step.py --benchmark-only -q --rounds 20 --baselines auto" \
    "--benchmark-json $out/$1.json ${*:2}"
}
d8="--depth 8 --num-iterations 330 --eval-every 110" # within one epoch of five shards
rate="--bigram-embedding-lr-mult"
case $call in
  1) # d16-compiled-fp8 takes a whole call of one GPU
    cat > /tmp/jobs << END
460 560 d16-compiled-fp8 $(data=$three train d16-compiled-fp8 --depth 16 --num-iterations 150 --eval-every 50 --backend compile --skip-initial-eval)
20 60 tune python3 -m bench.tune linear_relu_squared_bwd_bf16 linear_relu_squared_bwd; cp kernels/tuned.json $out
25 100 d4-fused-bf16 $(train d4-fused-bf16 --depth 4 --num-iterations 20 --eval-every 5 --fp8 off)
30 60 d4-eager-bf16 $(train d4-eager-bf16 --depth 4 --num-iterations 20 --eval-every 5 --fp8 off --backend eager)
120 200 bench-d16-bf16 $(bench d16-bf16 --depth 16 --fp8 off --no-cuda-graphs)
30 60 profile-d16-bf16 python3 -m bench.profile --depth 16 --fp8 off --out $out/profile-d16-bf16
30 60 d4-fused-fp8 $(train d4-fused-fp8 --depth 4 --num-iterations 300 --eval-every 150)
30 60 bench-mlp python3 -m pytest bench/bench_linear_relu_squared.py --benchmark-only -q --benchmark-json $out/mlp.json
80 130 d8-e4m3 rm -rf /tmp/e4m3; cp -r . /tmp/e4m3; cd /tmp/e4m3; sed -i s/E5M2/E4M3/ model/fused.py; $(train d8-e4m3 $d8)
END
    ;;
  2) # fresh caches are filled by one compiling run per GPU
    cat > /tmp/jobs << END
200 320 bench-d16 $(bench d16 --depth 16 --no-cuda-graphs)
200 320 bench-d12 $(bench d12 --depth 12)
230 330 bench-d20 $(bench d20 --depth 20 --device-batch-size 16 --no-cuda-graphs)
85 120 d8-bigram-rate-0.5 $(train d8-bigram-rate-0.5 $d8 $rate 0.5)
85 120 d8-bigram-rate-2 $(train d8-bigram-rate-2 $d8 $rate 2)
END
    ;;
esac
"$(dirname "$0")/queue.sh" "$out" "$seconds" "$archive" < /tmp/jobs
