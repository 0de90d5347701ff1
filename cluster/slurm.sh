#!/bin/bash
#SBATCH --job-name=dpo-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# One run on the nodes of an allocation; from the checkout:
#   sbatch --nodes=2 cluster/slurm.sh pipelines/ultrafeedback_qwen3_8b_8gpu.yaml --root /shared/dpo-ray
# A requeued or resubmitted job goes on where the last one was ended.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: sbatch cluster/slurm.sh CONFIG [--field value ...]" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:?this is a job script: start it with sbatch}"
. .venv/bin/activate

# The token that keeps other users of the network off the cluster: a file on shared storage that only its owner reads.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")
export RAY_USAGE_STATS_ENABLED=0 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
# A node that loses power is missed by the head after a minute; who waits for its answer would wait seven.
export RAY_grpc_client_keepalive_time_ms=30000 RAY_grpc_client_keepalive_timeout_ms=30000

# On the first node this starts Ray's head and then the command, on the others workers; when the command ends, Ray does.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_NNODES" --num-cpus="$SLURM_CPUS_PER_TASK" -- \
    python pipelines/full_round.py "$@"
