# The body of every launcher: `launch COMMAND [options of dsv3 COMMAND]`.
# On a login node it submits the launcher to Slurm. In the job it excludes unhealthy nodes, trains on
# the others, and requeues the job if that can help; the run resumes from its latest checkpoint.
#   RUN=runs/name slurm/train.sbatch …    chooses the run directory
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
  if nodes=$(healthy_nodes); then train "$@" || code=$?; else code=1; fi
  finish "$code"
}

submit() {  # pass on the options of dsv3, without the command, which the launcher adds itself
  cd "$(dirname "$0")/.."
  . slurm/env.sh
  [ "$GPUS" = 0 ] || SBATCH_OPTIONS+=" --gpus-per-node=$GPUS"
  exec sbatch --nodes="$NODES-$((NODES + SPARES))" $SBATCH_OPTIONS "slurm/$(basename "$0")" "${@:2}"
}

healthy_nodes() {  # print the first NODES healthy nodes as a list for srun
  "$PYTHON" -m dsv3_ref preflight --folder "$run" --min-nodes "$NODES" --gpus "$GPUS" \
    --ranks "$RANKS" $PREFLIGHT | cut -d, -f "-$NODES"
}

train() {  # start one process per rank; Slurm forwards signals to them and returns their exit code
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

finish() {  # 0: done; 2: a user error; 75, 138 or 143 (SIGUSR1, SIGTERM): stopped on request
  case $1 in
    0) ;;
    2) tail -n 1 "$logs/rank-0.txt" ;;
    75 | 138 | 143) requeue "exit code $1: stopped on request" ;;
    *) if has_no_progress; then echo "exit code $1, and no new checkpoint in $RETRIES starts: giving up"
       else requeue "exit code $1: failed, see $logs"; fi ;;
  esac
  exit "$1"
}

requeue() {
  echo "$1; the job is requeued"
  scontrol requeue "$SLURM_JOB_ID"
}

has_no_progress() {  # succeed if the last RETRIES failures had the same latest checkpoint
  local newest
  newest=$(ls "$run/checkpoints" 2>/dev/null | tail -n 1)
  echo "${newest:-none}" >> "$run/logs/failures"
  [ "$(tail -n "$RETRIES" "$run/logs/failures" | grep -cx -- "${newest:-none}")" -ge "$RETRIES" ]
}
