# Sourced by the batch scripts beside it: runs a command as the job's tasks, and requeues
# the job if the exit code asks for a restart (facedist/errors.py).

# The command of every task. srun returns the highest of their exit codes. If one task fails,
# srun stops the others, which then end with 128 or above. So the most important code is made
# the highest: permanent codes become 201 and above, and 143 becomes the lowest, 100. A task
# that a signal ends hides all codes, so a permanent code also forbids Slurm to requeue.
#
# After 143 only the chief reports it and the others end with 0: srun stops all tasks at the
# first code other than 0, and the chief may still be saving.
facedist_task='
trap : TERM USR1 USR2  # the command decides what a signal means
"$@"
code=$?
if ((code == 143)); then
  code=$((SLURM_PROCID == 0 ? 100 : 0))
elif ((code > 0 && code < 128)); then
  scontrol update jobid="$SLURM_JOB_ID" Requeue=0
  code=$((code > 55 ? 255 : code + 200))
fi
exit "$code"
'

# Runs "$@" in every task of the job, then ends this script or requeues the job.
run_step() {
  local code=0
  trap : TERM USR1 USR2  # it still has to requeue; srun gets them too and ends
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-}  # not inherited from 22.05 on
  [[ -n $SRUN_CPUS_PER_TASK ]] || unset SRUN_CPUS_PER_TASK
  srun --kill-on-bad-exit=1 --wait=0 --distribution=block --export=ALL \
    bash -c "$facedist_task" facedist "$@" || code=$?
  if ((code > 200)); then
    code=$((code - 200))
  elif ((code == 100)); then
    code=143
  fi
  if ((code >= 128)); then
    requeue "$code"
  elif ((code > 0)); then
    echo "exit code $code is permanent: the job is not requeued." >&2
  fi
  exit "$code"
}

# Requeues the job, unless it was cancelled or failed too often; returns if not.
requeue() {
  local code=$1 restarts=${SLURM_RESTART_COUNT:-0} most=${FACEDIST_MAX_RESTARTS:-50} now
  if ((code != 143 && restarts >= most)); then
    echo "exit code $code after $restarts restarts: FACEDIST_MAX_RESTARTS=$most" \
      "forbids another." >&2
    return
  fi
  # A job that is being cancelled, or that Slurm itself requeues, is COMPLETING too.
  now=$(scontrol --oneliner show job "$SLURM_JOB_ID")
  if [[ $now == *Requeue=0* ]]; then
    echo "exit code $code, but the job may not be requeued: a task failed for good, or" \
      "sbatch had --no-requeue." >&2
    return
  fi
  if [[ $now != *JobState=RUNNING* && $now != *Reason=TimeLimit* ]]; then
    return
  fi
  echo "exit code $code: the job is requeued (restart $((restarts + 1)))." >&2
  scontrol requeue "$SLURM_JOB_ID" && sleep 600  # until Slurm ends this script
}
