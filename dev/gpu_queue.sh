#!/usr/bin/env bash
# Runs jobs on all GPUs of this machine until the time is over; a free GPU takes the next job that fits.
#
#     dev/gpu_queue.sh OUT SECONDS ARCHIVE < JOBS
#
# JOBS has one job a line: the least seconds worth starting it with, the most it may take, a name, and a command, which
# sees one GPU, and OUT as $QUEUE. Empty lines and lines that begin with # are skipped. Run it in the root of the clone: a job's training
# runs are looked for in runs/.
#
# OUT/NAME.txt     what job NAME printed
# OUT/RUN.jsonl    the metrics of runs/RUN
# OUT/jobs.txt     how and when each job ended (status 124 or 137: cut by its limit)
# OUT/left.txt     the jobs that found no time
#
# ARCHIVE, a .tgz outside of OUT, is rebuilt after each job from all of OUT but Chrome traces, so that a machine that
# goes away takes only the last jobs with it.
set -u
if [ $# != 3 ] || ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
  echo "error: usage: dev/gpu_queue.sh OUT SECONDS ARCHIVE < JOBS" >&2
  exit 2
fi
out=$1 limit=$2 archive=$3 lock=$1/.lock
gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader) || { echo "error: nvidia-smi finds no GPU" >&2; exit 2; }
export QUEUE=$out
mkdir -p "$out" && grep -v -e '^#' -e '^ *$' > "$out/left.txt"

take() { # the first line whose least time is left, out of left.txt
  exec 9> "$lock"
  flock 9
  local line
  line=$(awk -v left=$((limit - SECONDS)) '$1 <= left { print NR; exit }' "$out/left.txt")
  if [ -n "$line" ]; then
    sed -n "${line}p" "$out/left.txt"
    sed -i "${line}d" "$out/left.txt"
  fi
  exec 9>&-
}

pack() { # the metrics of all runs so far, then all of OUT
  exec 9> "$lock"
  flock 9
  local run
  for run in runs/*/; do
    [ -f "${run}metrics.jsonl" ] && cp "${run}metrics.jsonl" "$out/$(basename "$run").jsonl"
  done
  tar czf "$archive.new" --exclude=.lock --exclude=trace.json.gz --warning=no-file-changed -C "$out" .
  [ $? -le 1 ] && mv "$archive.new" "$archive" # 1: a file grew meanwhile
  exec 9>&-
}

work() { # jobs on one GPU
  export CUDA_VISIBLE_DEVICES=$1
  local job least most name command began group status
  while job=$(take) && [ -n "$job" ]; do
    read -r least most name command <<< "$job"
    [ "$most" -gt $((limit - SECONDS)) ] && most=$((limit - SECONDS))
    began=$SECONDS
    echo "$name: started at $SECONDS s, GPU $1" >> "$out/jobs.txt"
    timeout -k 10 "$((most > 0 ? most : 1))" bash -c "$command" > "$out/$name.txt" 2>&1 < /dev/null &
    group=$! # timeout leads a process group
    wait "$group"
    status=$?
    kill -KILL -- "-$group" 2> /dev/null # what outlives the command would disturb the next job
    echo "$name: status $status after $((SECONDS - began)) s, at $SECONDS s, GPU $1" | tee -a "$out/jobs.txt"
    grep -E "val bpb|^\| [0-9]+ \||^FAILED|^(=+ )?[0-9]+ (passed|failed)" "$out/$name.txt" | cut -c1-200
    pack
  done
}

for gpu in $gpus; do
  work "$gpu" &
done
wait
rm "$lock"
