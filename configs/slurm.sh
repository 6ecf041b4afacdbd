#!/bin/bash
# Trains on several nodes under SLURM: sbatch configs/slurm.sh configs/gpt2-124m.toml [key=value …]
#
# One torchrun a node, one rank a GPU. Ten minutes before the time limit SLURM sends SIGTERM to all
# ranks: they save one checkpoint and end with status 75, and the job is queued again. The next one
# resumes from the newest sound checkpoint. Nodes that fail are replaced the same way (--requeue).
#SBATCH --job-name=fasttrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail
: "${1:?usage: sbatch configs/slurm.sh CONFIG.toml [section.key=value …]}"

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A port of this job's own, so that two jobs on one node do not meet.
port=$((20000 + SLURM_JOB_ID % 20000))
gpus=${SLURM_GPUS_ON_NODE:-8}
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-$gpus} > gpus ? SLURM_CPUS_PER_TASK / gpus : 1))
# Nodes with several networks: name the one that connects them, for NCCL and for gloo.
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

# The name of the run is the job's, which it keeps when it is queued again.
name="$(basename "$1" .toml)-$SLURM_JOB_ID"
out_dir=${FASTTRAIN_RUNS:-runs}
resume=()
if compgen -G "$out_dir/$name/checkpoints/step-*" > /dev/null; then
    resume=(--resume auto)
elif [ -d "$out_dir/$name" ]; then
    mv "$out_dir/$name" "$out_dir/$name-without-checkpoint-$(date +%s)"
fi

srun --kill-on-bad-exit=1 python -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$gpus" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:$port" \
    --max-restarts 3 \
    -m fasttrain.train "$@" "run.out_dir=$out_dir" "run.name=$name" "${resume[@]}"
status=$?
# torchrun's own status is 1 however its ranks end; the log tells a run that stopped from one that
# failed.
if [ "$status" -ne 0 ] && tail -n 20 "$out_dir/$name/train.log" | grep -q "  stopped:$"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
