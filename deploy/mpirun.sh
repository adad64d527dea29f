#!/bin/bash
# A run under Open MPI 4 or 5, one process a slot: docs/hosts.md.
#   deploy/mpirun.sh node1:8,node2:8 --config=configs/vit_lora.py --workdir=/shared/runs/a
# The first host is where process 0 runs. PORT=12321 and TRIES=10 are what they are by default.
set -u
if [ $# -lt 2 ]; then
    sed -n 's/^# \{0,1\}//; 2,4p' "$0" >&2
    exit 2
fi
hosts=$1
shift
export JAX_COORDINATOR_ADDRESS="${hosts%%[:,]*}:${PORT:-12321}"
for attempt in $(seq "${TRIES:-10}"); do
    mpirun --host "$hosts" --map-by slot -x JAX_COORDINATOR_ADDRESS -x PATH \
        vision_jax "$@" --coordinator=auto
    code=$?
    # 2 is bad input: the same command would end the same. After all else the run goes on.
    if [ "$code" -eq 0 ] || [ "$code" -eq 2 ] || [ "$code" -ge 128 ]; then
        exit "$code"
    fi
    echo "ended with $code: attempt $attempt of ${TRIES:-10}, going on from the last checkpoint" >&2
done
exit "$code"
