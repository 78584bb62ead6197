#!/bin/bash
# Llama 3.1 8B on two hosts of eight GPUs: sbatch configs/slurm.sh
# 90 seconds before the time limit SLURM sends SIGUSR1: Lightning saves a checkpoint of the adapter, requeues the job and resumes from it.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=SIGUSR1@90
#SBATCH --requeue

srun lightning-lora fit --config configs/fsdp2.yaml --trainer.num_nodes=2 --trainer.accumulate_grad_batches=1
