# The body of every launcher: `launch COMMAND [options of dsv3 COMMAND]`.
# On a login node it sends the launcher to Slurm. In the job it drops bad nodes, trains on the good
# ones, and queues the job again where that helps; the run goes on from its newest checkpoint.
#   RUN=runs/name slurm/train.sbatch …    chooses the folder
# Rank k writes to <run>/logs/<job>.<restart>/rank-<k>.txt.
set -euo pipefail

launch() {
  if [ -z "${SLURM_JOB_ID:-}" ]; then submit "$@"; fi
  cd "$SLURM_SUBMIT_DIR"
  . slurm/env.sh
  run=${RUN:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}
  logs=$run/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  mkdir -p "$logs"
  local code=0
  if nodes=$(good_nodes); then train "$@" || code=$?; else code=1; fi
  finish "$code"
}

submit() {  # the options of dsv3 follow the command, which the launcher knows itself
  cd "$(dirname "$0")/.."
  . slurm/env.sh
  [ "$GPUS" = 0 ] || SBATCH_OPTIONS+=" --gpus-per-node=$GPUS"
  exec sbatch --nodes="$NODES-$((NODES + SPARES))" $SBATCH_OPTIONS "slurm/$(basename "$0")" "${@:2}"
}

good_nodes() {  # the first NODES of those that the preflight leaves, as srun wants them
  "$PYTHON" -m dsv3_ref preflight --folder "$run" --min-nodes "$NODES" --gpus "$GPUS" \
    --ranks "$RANKS" $PREFLIGHT | cut -d, -f "-$NODES"
}

train() {  # a process for every rank; Slurm brings signals to each and exit codes back
  export MASTER_ADDR MASTER_PORT WORLD_SIZE LOCAL_WORLD_SIZE=$RANKS
  MASTER_ADDR=$(scontrol show node "${nodes%%,*}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
  WORLD_SIZE=$((NODES * RANKS))
  [ ! -e "$run/run.json" ] || set -- "$@" --resume
  echo "dsv3 $* on $nodes, $RANKS ranks each; logs: $logs"
  srun --nodelist="$nodes" --nodes="$NODES" --ntasks="$WORLD_SIZE" --ntasks-per-node="$RANKS" \
    --cpus-per-task=$((SLURM_CPUS_ON_NODE / RANKS)) --distribution=block --wait="$STRAGGLE" \
    --output="$logs/rank-%t.txt" \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' rank \
    "$PYTHON" -m dsv3_ref "$@" --out "$run"
}

finish() {  # 0: done; 2: a user's mistake; 75, or dead of a signal that asks: preempted
  case $1 in
    0) ;;
    2) tail -n 1 "$logs/rank-0.txt" ;;
    75 | 138 | 143) again "exit code $1: stopped by request" ;;
    *) if hopeless; then echo "exit code $1, and no new checkpoint in $RETRIES starts: giving up"
       else again "exit code $1: failed, see $logs"; fi ;;
  esac
  exit "$1"
}

again() {
  echo "$1; the job is queued again"
  scontrol requeue "$SLURM_JOB_ID"
}

hopeless() {  # whether the newest checkpoint was the newest at the last RETRIES failures
  local newest
  newest=$(ls "$run/checkpoints" 2>/dev/null | tail -n 1)
  echo "${newest:-none}" >> "$run/logs/failures"
  [ "$(tail -n "$RETRIES" "$run/logs/failures" | grep -cx -- "${newest:-none}")" -ge "$RETRIES" ]
}
