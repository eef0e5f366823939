# Settings of every launcher. The environment goes first: NODES=256 slurm/train.sbatch …
: "${NODES:=1}"    # nodes that train
: "${SPARES:=0}"   # nodes asked for besides, to take the places of those that the preflight drops
: "${GPUS:=8}"     # GPUs of a node; 0: train on CPU, over gloo
: "${RANKS:=$((GPUS ? GPUS : 1))}"   # processes of a node
: "${RETRIES:=3}"  # failures in succession without a new checkpoint after which a job gives up
: "${STRAGGLE:=60}"  # seconds between the ends of the first and the last rank
: "${PYTHON:=.venv/bin/python}"

# How sbatch is asked, once and for all: --partition=… --account=… --time=…
: "${SBATCH_OPTIONS:=--exclusive}"

# What a node must have, see `dsv3 preflight --help`: guesses, far below what NVLink and InfiniBand
# of the report's cluster can carry (160 and 50 GB/s, §3.2.2). Set them by nodes known to be good.
: "${PREFLIGHT:=--min-free-gb 100 --min-disk-mb-s 200 --min-node-gb-s 50 --min-net-gb-s 2}"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5   # where the first guess is wrong
