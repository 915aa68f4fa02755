#!/usr/bin/env bash
# The same command on every node, NODE_RANK from 0; killed or stopped, it goes on from where it was.
#   HEAD=node0 NODES=8 NODE_RANK=0 ./torchrun.sh config.yaml /shared/runs/tar-70b
set -euo pipefail
: "${HEAD:=localhost}" "${NODES:=1}" "${NODE_RANK:=0}" "${GPUS:=8}" "${PYTHON:=python}"
exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" -m fastguard immunize "$1" --out "$2"
