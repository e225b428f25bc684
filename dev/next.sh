#!/usr/bin/env bash
# The GPU jobs that dev/LOG.md has as due next, in two calls of at most 10 minutes on a machine with two GPUs:
#
#     bash dev/next.sh 1|2 OUT SECONDS
#
# The data (five training shards, the last validates) and tokenizer.json lie in $DATA, libraries on PYTHONPATH; what the
# tests without the kit may have of them (rustbpe) on $BARE.
set -u
call=$1 out=$(realpath -m "$2") seconds=$3
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
  echo "python3 -m train.run --run $1 --data ${data:-$DATA} --eval-tokens 2097152 --sample-every -1" \
    "--train-log-every 10 ${*:2}; cp runs/$1/metrics.jsonl $out/$1.jsonl; rm -rf runs/$1"
}
bench() { # name flags...
  echo "python3 -m pytest bench/bench_step.py --benchmark-only -q --rounds 20 --baselines auto" \
    "--benchmark-json $out/$1.json ${*:2}"
}
tests="env OMP_NUM_THREADS=1 python3 -m pytest -v -rf" # by name: a run that is cut tells what it did
# within one epoch of five shards
d8="--depth 8 --num-iterations 330 --eval-every 110" d12="--depth 12 --num-iterations 165 --eval-every 55"
dense="--bigram-embed-factor 0"
case $call in
  1)
    cat > /tmp/jobs << END
100 420 tests-kit $tests -n 15 tests -k 'not two_to_the_31'
100 420 tests-no-kit PYTHONPATH=${BARE:-} $tests -n 15 tests/model tests/train tests/bench tests/test_layers.py
20 60 tests-2-31 $tests tests/kernels -k two_to_the_31
145 190 d12-fused-fp8 $(train d12-fused-fp8 $d12)
145 190 d12-fused-fp8-dense $(train d12-fused-fp8-dense $d12 $dense)
100 200 bench-d12 $(bench d12 --depth 12)
60 120 bench-d4 $(bench d4 --depth 4)
40 80 d4-fused-fp8 $(train d4-fused-fp8 --depth 4 --num-iterations 300 --eval-every 150)
80 130 d8-e4m3 rm -rf /tmp/e4m3; cp -r . /tmp/e4m3; cd /tmp/e4m3; sed -i s/E5M2/E4M3/ model/fused.py; $(train d8-e4m3 $d8)
END
    ;;
  2)
    cat > /tmp/jobs << END
500 560 d16-compiled-fp8 $(data=$three train d16-compiled-fp8 --depth 16 --num-iterations 150 --eval-every 50 --backend compile --skip-initial-eval)
20 60 tune python3 -m bench.tune linear_relu_squared_bwd_bf16 linear_relu_squared_bwd
25 100 d4-fused-bf16 $(train d4-fused-bf16 --depth 4 --num-iterations 20 --eval-every 5 --fp8 off)
30 60 d4-eager-bf16 $(train d4-eager-bf16 --depth 4 --num-iterations 20 --eval-every 5 --fp8 off --backend eager)
120 260 bench-d16-bf16 $(bench d16-bf16 --depth 16 --fp8 off --no-cuda-graphs)
30 60 tests-again $tests -n 8 tests/model/test_fused.py tests/kernels/test_tuning.py tests/kernels/test_linear_relu_squared.py tests/train/test_data.py tests/train/test_tokenizer.py
40 80 d4-fused-fp8 $(train d4-fused-fp8 --depth 4 --num-iterations 300 --eval-every 150)
30 60 profile-d16-bf16 python3 -m bench.profile --depth 16 --fp8 off --out $out/profile-d16-bf16
100 200 bench-d12 $(bench d12 --depth 12)
30 60 bench-loader python3 -m pytest bench/bench_loader.py --benchmark-only -q
END
    ;;
esac
"$(dirname "$0")/queue.sh" "$out" "$seconds" < /tmp/jobs
for run in runs/*/; do # what was cut
  [ -f "$run/metrics.jsonl" ] && cp "$run/metrics.jsonl" "$out/$(basename "$run").jsonl"
done
[ "$call" = 1 ] || cp kernels/tuned.json "$out"
