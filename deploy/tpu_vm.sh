#!/bin/bash
# A run on all workers of a TPU VM slice: docs/hosts.md.
#   deploy/tpu_vm.sh install NAME ZONE                       this checkout, on each worker
#   deploy/tpu_vm.sh run NAME ZONE --config=... --workdir=/shared/runs/a
# A slice is made before with, for example,
#   gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v5litepod-16 \
#       --version=v2-alpha-tpuv5-lite
set -u
if [ $# -lt 3 ] || { [ "$1" != install ] && [ "$1" != run ]; }; then
    sed -n 's/^# \{0,1\}//; 2,4p' "$0" >&2
    exit 2
fi
what=$1 name=$2 zone=$3
shift 3
all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

if [ "$what" = install ]; then
    all 'mkdir -p ~/source' && gcloud compute tpus tpu-vm scp --recurse --zone="$zone" --worker=all \
        pyproject.toml constraints.txt README.md LICENSE configs vision_jax "$name:source/" &&
        all 'python3 -m venv ~/venv && ~/venv/bin/pip install -c ~/source/constraints.txt "$HOME/source[tpu]"'
    exit
fi
arguments=$(printf ' %q' "$@")
for attempt in $(seq "${TRIES:-10}"); do
    all "~/venv/bin/vision_jax$arguments --coordinator=auto"
    code=$?
    # 2 is bad input: the same command would end the same. After all else the run goes on.
    if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then
        exit "$code"
    fi
    echo "ended with $code: attempt $attempt of ${TRIES:-10}, going on from the last checkpoint" >&2
done
exit "$code"
