#!/bin/bash
#SBATCH --job-name=llama-3-8b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --signal=TERM@120

# Process 0 listens on the first node of the job.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
run=$HOME/runs/llama-3-8b
[ -e "$run/run.json" ] && resume=--resume

# One process a node; each finds the eight cards of its node. $SLURM_PROCID differs from process to process.
export first run resume
srun bash -c 'exec jaxllm train llama-3-8b --mesh h100:16 --layout data=16,zero=3,remat=full \
  --batch 64 --text corpus.txt --tokenizer tokenizer.json --lr 3e-4 --steps 10000 --save-every 200 \
  --out "$run" $resume --processes "$SLURM_NTASKS" --process "$SLURM_PROCID" --coordinator "$first:12345"'

# Ended by SIGTERM, with a checkpoint: to the queue again, and on from there.
code=$?
[ $code -eq 143 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
