#!/usr/bin/env bash
# Train on many nodes under Slurm: one torchrun agent a node, which starts a process for each GPU.
#
#     OUT=/shared/runs/15b sbatch --nodes 12 recipes/slurm.sh train.py nemotron4_15b --data /shared/data/mine
#
# The arguments are a program of ours and its options; --out comes from OUT, which all nodes share.
# A run goes on from its newest checkpoint, so every start is the same command: after the time limit
# and after a dead node Slurm starts it again, after a dead process torchrun does.
# .github/CLUSTER.md says what to watch. GPUS is the number of processes a node, on CPUs as well.
#SBATCH --job-name=nemotron4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# USR1 reaches this script 20 minutes before the limit, and becomes a TERM for the training, which
# finishes its step and saves. TERM itself is left to scancel, after which nothing comes back.
#SBATCH --signal=B:USR1@1200
# a job whose node fails goes back into the queue; its log is continued
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
: "${OUT:?set OUT to a folder that all nodes see: a run without a name of its own would start anew}"
cd "${SLURM_SUBMIT_DIR:-.}"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# ---- what the processes find in their environment ------------------------------------------------

# The network for meeting (NCCL, gloo) where a node has several: the default may be one that does not
# reach the others. It is the Ethernet's name; InfiniBand is found without it.
if [[ -n ${IFNAME:-} ]]; then
    export NCCL_SOCKET_IFNAME=$IFNAME GLOO_SOCKET_IFNAME=$IFNAME
fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}    # says why a connection failed, and nothing else
export NCCL_IB_TIMEOUT=22                # 17 s, not 1, for a switch that fails over to answer
export TORCH_NCCL_DUMP_ON_TIMEOUT=1      # a collective that hangs leaves a record of who was where,
export TORCH_FR_BUFFER_SIZE=2000         # of its last 2,000 ones,
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$OUT-hang-  # in a file a rank
# without this an agent that comes back waits in vain for rank 0's address (torch 2.13)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PYTORCH_ALLOC_CONF=expandable_segments:True  # batches and windows of many sizes: fewer holes
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}        # a process's threads, else torchrun says 1

# ---- training ------------------------------------------------------------------------------------

asked=0
trap 'asked=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1  # to the step, not to this script

# --max-restarts: a process that dies takes its peers with it, and all start again from the newest
#   checkpoint, where there is hope: a wrong option fails four times in a minute.
# --shutdown-timeout: how long a stopping process may take for its step and its save. It is also what
#   a restart waits for processes that hang in a collective.
# --kill-on-bad-exit: an agent that gives up ends the job, instead of leaving the others to wait.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${GPUS:-8}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:${PORT:-29500}" \
    --max-restarts 3 --shutdown-timeout "${SHUTDOWN:-600}" \
    "$@" --out "$OUT" &
step=$!
status=0
while kill -0 "$step" 2>/dev/null; do  # a signal ends `wait`, but not the step
    status=0
    wait "$step" || status=$?
done

if ((asked)); then
    scontrol requeue "$SLURM_JOB_ID"  # the time is up, the run is not over
    exit 0
fi
exit "$status"
