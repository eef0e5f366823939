# Settings of every launcher. The environment takes precedence: NODES=256 slurm/train.sbatch …
: "${NODES:=1}"    # nodes that train
: "${SPARES:=0}"   # additional nodes that replace those which the preflight check excludes
: "${GPUS:=8}"     # GPUs per node; 0: train on CPU, over gloo
: "${RANKS:=$((GPUS ? GPUS : 1))}"   # processes per node
: "${RETRIES:=3}"  # consecutive failures without a new checkpoint after which a job gives up
: "${STRAGGLE:=60}"  # seconds that ranks may run after the first one has ended
: "${PYTHON:=.venv/bin/python}"

# Options of every sbatch call: --partition=… --account=… --time=…
: "${SBATCH_OPTIONS:=--exclusive}"

# What a node must reach, see `dsv3 preflight --help`. These are guesses, far below what NVLink and
# InfiniBand of the report's cluster can carry (160 and 50 GB/s, §3.2.2). Replace them with
# measurements of good nodes.
: "${PREFLIGHT:=--min-free-gb 100 --min-disk-mb-s 200 --min-node-gb-s 50 --min-net-gb-s 2}"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5   # if NCCL chooses the wrong interface
