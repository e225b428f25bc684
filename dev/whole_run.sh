#!/usr/bin/env bash
# Trains runs to their end on several GPUs, in as many calls as it takes; then one loses a rank and
# goes on with half.
#
#     dev/whole_run.sh OUT GPUS SECONDS [flags of train.run]
#
# Run in the clone's root, again and again where one call's time is short: a run that SIGTERM stopped
# is saved, and goes on with the next call. Flags hold for all runs, such as --data FOLDER --depth 16
# --long-documents split. There are three: `dense` (nanochat's recipe), `bigram` (ours), and `killed`,
# of 100 steps that are saved every 20, which loses its last rank behind step 40 and is resumed by half
# of the GPUs. OUT gets what they print and their metrics.
set -u
if [ $# -lt 3 ] || ! [[ $2 =~ ^[1-9][0-9]*$ && $3 =~ ^[1-9][0-9]*$ ]]; then
  echo "error: usage: dev/whole_run.sh OUT GPUS SECONDS [flags of train.run]" >&2
  exit 2
fi
out=$1 gpus=$2 limit=$3
shift 3
flags=("$@")
mkdir -p "$out"

train() { # NAME GPUS FLAGS: from the start or from where the run was stopped; its exit status
  local name=$1 ranks=$2 from=() status
  shift 2
  [ -d "runs/$name" ] && from=(--resume)
  [ $((limit - SECONDS)) -gt 10 ] || return 99
  # time to save, before whoever set the limit kills all
  timeout -s TERM -k 60 $((limit - SECONDS)) \
    python3 -m train.run --run "$name" --gpus "$ranks" "${from[@]}" "${flags[@]}" "$@" >> "$out/$name.txt" 2>&1
  status=$?
  cp "runs/$name/metrics.jsonl" "$out/$name.jsonl" 2> /dev/null
  return $status
}

whole() { # NAME FLAGS
  local name=$1
  shift
  [ -e "runs/$name/ended" ] && return
  train "$name" "$gpus" "$@" && touch "runs/$name/ended"
  echo "$name: $(tail -n 1 "$out/$name.txt" | cut -c1-300)"
}

steps() { # NAME: the last step in a run's metrics
  grep -o '"kind": "train", "step": [0-9]*' "runs/$1/metrics.jsonl" 2> /dev/null | tail -n 1 | grep -o '[0-9]*$'
}

last_rank() { # the process id of the last rank of run `killed`
  local pid
  for pid in $(pgrep -f -- "--run killed"); do
    tr '\0' '\n' < "/proc/$pid/environ" 2> /dev/null | grep -qx "RANK=$((gpus - 1))" && echo "$pid"
  done | tail -n 1
}

whole dense --bigram-embed-factor 0 --no-muon-plus --muon-eq none --scalar-lr 0.5
whole bigram
if [ "$gpus" -gt 1 ] && [ ! -d runs/killed ] && [ $((limit - SECONDS)) -gt 60 ]; then
  train killed "$gpus" --num-iterations 100 --save-every 20 --train-log-every 1 &
  until [ "$(steps killed || echo 0)" -ge 41 ] 2> /dev/null; do
    kill -0 $! 2> /dev/null || break
    sleep 0.05
  done
  lost=$(last_rank)
  [ "$lost" ] && kill -KILL "$lost"
  wait $!
  status=$?
  echo "killed: rank $((gpus - 1)), process ${lost:-none}, behind step $(steps killed); status $status"
  train killed $((gpus / 2)) --num-iterations 100
  status=$?
  echo "killed, resumed by $((gpus / 2)): status $status; $(tail -n 1 "$out/killed.txt" | cut -c1-300)"
fi
