#!/usr/bin/env bash
# Trains on the machines of a SLURM job, one torchrun on each; the rest of the line is the run and its flags:
#   sbatch run_slurm.sh ./run_rwkv7.sh --adam_lr 0.0026 --fast_cuda
#   sbatch --nodes=4 --gpus-per-node=4 run_slurm.sh ./run_gpt2.sh --seq_len 2048
# Submit it from this folder, on a disk that every machine sees. Edit the lines below, or override them as above. Three
# minutes before its time is up the run saves itself and the job queues again, as SLURM does itself when it takes a
# machine away; each time it goes on from its last checkpoint in checkpoints/slurm_<job>/. After a failure,
# scontrol requeue <job> does the same; after the last step it would begin anew.
#SBATCH --job-name=rwkv-speedrun
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -eu
case "${1:-}" in -h | --help) sed -n 's/^# //p' "$0"; exit;; esac
[ "$#" -gt 0 ] || { echo "usage: sbatch run_slurm.sh ./run_rwkv7.sh FLAGS..." >&2; exit 2; }
cd -- "${SLURM_SUBMIT_DIR:?"start it with sbatch"}"
[ -e setup.sh ] || { echo "run_slurm.sh: submit it from the folder of the repository, not from $PWD" >&2; exit 1; }
. ./setup.sh
setup_python requirements.txt  # once, before every machine would do it at the same time
NNODES=$SLURM_JOB_NUM_NODES
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${MASTER_ADDR%%$'\n'*}  # the first machine
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export NNODES MASTER_ADDR MASTER_PORT
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take sbatch's by itself
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150            # s that torchrun gives a run that saves itself

run=$1 again=""
shift
trap 'again=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1  # to the processes of srun, not to this shell
checkpoints=checkpoints/slurm_$SLURM_JOB_ID
srun --kill-on-bad-exit=1 "$run" --save_every 125 --checkpoints "$checkpoints" --resume auto "$@" &
status=0
wait "$!" || status=$?
if [ -n "$again" ]; then  # the signal broke off the wait
    status=0
    wait "$!" || status=$?
    [ "$status" -eq 0 ] || exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
