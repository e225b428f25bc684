#!/usr/bin/env bash
# Packs what a GPU machine with torch and Triton, but without a network, needs to run this clone.
#
#     dev/offline_kit.sh OUT DATA [ARCHIVE ...]
#
# DATA is a folder of parquet shards; ARCHIVEs are .tar.xz files of packages (Transformer Engine
# built for the torch there, FlashAttention 4 with what it needs). Into OUT go these, a wheel of
# nvmath-python for Python 3.12, the shards, compressed further, a tokenizer trained on them, and
# env.sh. There, in the clone, for OUT or any part of it that has env.sh:
#
#     source OUT/env.sh     # unpacks into /tmp/kit, sets PYTHONPATH and DATA
set -euo pipefail
if [ $# -lt 2 ] || [ ! -d "$2" ]; then
  echo "error: usage: dev/offline_kit.sh OUT DATA [ARCHIVE ...], DATA a folder of parquet shards" >&2
  exit 2
fi
out=$1 data=$2
shift 2
mkdir -p "$out"
for archive in "$@"; do cp "$archive" "$out/"; done
platforms=()
for libc in 2014 _2_17 _2_27 _2_28; do platforms+=(--platform "manylinux${libc}_x86_64"); done
python3 -m pip download --quiet --no-deps --only-binary :all: --python-version 3.12 "${platforms[@]}" \
  --dest "$out" "$(grep '^nvmath-python==' "$(dirname "$0")/constraints.txt")"
python3 - "$data" "$out" << 'PYTHON'
import sys
from pathlib import Path

import pyarrow.parquet as pq

for shard in sorted(Path(sys.argv[1]).glob("*.parquet")):
    options = {"compression": "zstd", "compression_level": 19, "use_dictionary": False}
    pq.write_table(pq.read_table(shard), Path(sys.argv[2], shard.name), row_group_size=1024, **options)
PYTHON
python3 -m train.data train-tokenizer --data "$out" --max-chars 60000000
cat > "$out/env.sh" << 'SHELL'
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p /tmp/kit/data
for archive in "$kit"/*.tar.xz; do
  name=/tmp/kit/$(basename "$archive" .tar.xz)
  if [ -f "$archive" ] && [ ! -d "$name" ]; then mkdir "$name" && tar xJf "$archive" -C "$name"; fi
done
for wheel in "$kit"/*.whl; do
  [ -f "$wheel" ] && python3 -m pip install --quiet --no-index --no-deps --upgrade --target /tmp/kit/site "$wheel"
done
cp -n "$kit"/*.parquet "$kit"/tokenizer.json /tmp/kit/data/ 2> /dev/null
cudnn=$(python3 -c "import nvidia.cudnn; print(list(nvidia.cudnn.__path__)[0])")
export CUDNN_HOME=$cudnn LD_LIBRARY_PATH=$cudnn/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
for folder in /tmp/kit/*/ /tmp/kit/*/nvidia_cutlass_dsl/dsl_packages; do
  [ "$folder" != /tmp/kit/data/ ] && [ -d "$folder" ] && PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}${folder%/}
done
export PYTHONPATH DATA=/tmp/kit/data PYTHONUNBUFFERED=1
SHELL
du -sh "$out"
