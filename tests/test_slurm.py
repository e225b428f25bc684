"""docs/slurm.sh tells every task its rank, in torchrun's words."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "docs" / "slurm.sh"
COMMANDS = {
    "scontrol": "echo host-a; echo host-b",  # show hostnames LIST
    # two hosts of two tasks, one after the other; the first argument is srun's own
    "srun": """shift
for task in 0 1 2 3; do SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@"; done""",
    "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*"',
}


@pytest.mark.skipif(os.name != "posix", reason="a script for bash")
def test_every_task_is_a_rank(tmp_path):
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "host-[a-b]",
        "SLURM_NTASKS": "4",
    }
    command = ["bash", SCRIPT, "--run", "a b"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{rank} {rank % 2} 4 host-a 23456 -m train.run --run a b" for rank in range(4)
    ]
