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
# Where your site asks for them, remove the "# " in front:
# #SBATCH --account=ACCOUNT
# #SBATCH --partition=PARTITION

if [ $# -eq 0 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "usage: sbatch configs/slurm.sh CONFIG.toml [section.key=value …]; SLURM runs this script." \
        "Without SLURM: torchrun --nproc-per-node N -m fasttrain.train CONFIG.toml" >&2
    exit 2
fi
set -uo pipefail

# The environment that fasttrain is installed in, on all nodes:
# module load python cuda
# source "$HOME/venv/bin/activate"

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A port of this job's own, so that two jobs on one node do not meet.
port=$((20000 + SLURM_JOB_ID % 20000))
gpus=${SLURM_GPUS_ON_NODE:-8}
cpus=${SLURM_CPUS_PER_TASK:-$gpus}
export OMP_NUM_THREADS=$((cpus > gpus ? cpus / gpus : 1))
# Nodes with several networks: name the one that connects them, for NCCL and for gloo.
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

# The name of the run is the job's, which it keeps when it is queued again.
name="$(basename "$1" .toml)-$SLURM_JOB_ID"
out_dir=${FASTTRAIN_RUNS:-runs}
log="$out_dir/$name/train.log"
n_lines=$(cat "$log" 2> /dev/null | wc -l)

# --resume auto: a new run the first time, later the newest sound checkpoint of this one.
# srun does not inherit --cpus-per-task since SLURM 22.05.
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
    python -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$gpus" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:$port" \
    --max-restarts 3 \
    -m fasttrain.train "$@" "run.out_dir=$out_dir" "run.name=$name" --resume auto
status=$?
# torchrun's own status is 1 however its ranks end; what this job added to the log tells a run that
# stopped from one that failed.
last_lines=$(tail -n "+$((n_lines + 1))" "$log" 2> /dev/null | tail -n 20)
if [ "$status" -ne 0 ] && grep -q "  stopped:$" <<< "$last_lines"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
