import pytest
from hypothesis import given
from hypothesis import strategies as st

from facedist import errors
from tfrecords_tools.builder import tasks

ARRAY = {
  "SLURM_ARRAY_TASK_ID": "5",
  "SLURM_ARRAY_TASK_COUNT": "8",
  "SLURM_ARRAY_TASK_MIN": "1",
  "SLURM_ARRAY_TASK_MAX": "8",
}


@given(num_items=st.integers(1, 60), num_tasks=st.integers(1, 70))
def test_each_item_is_one_tasks_and_shares_are_even(num_items, num_tasks):
  items = list(range(num_items))
  shares = [tasks.BuildTask(task, num_tasks).of(items) for task in range(num_tasks)]
  assert [item for share in shares for item in share] == items
  assert max(map(len, shares)) - min(map(len, shares)) <= 1
  for task, share in enumerate(shares):
    for item in share:
      assert tasks.BuildTask(0, num_tasks).task_of(item, num_items) == task


@pytest.mark.parametrize(
  ("num_tasks", "task_index", "environ", "expected"),
  [
    (None, None, {}, (0, 1)),
    (1, None, {"JOB_COMPLETION_INDEX": "3"}, (0, 1)),
    (64, 5, {}, (5, 64)),
    (64, 5, ARRAY | {"SLURM_ARRAY_TASK_ID": "9"}, (5, 64)),
    (64, None, {"JOB_COMPLETION_INDEX": "63"}, (63, 64)),
    (None, None, ARRAY, (4, 8)),  # --array=1-8
    (
      None,
      None,
      ARRAY | {"SLURM_ARRAY_TASK_STEP": "4", "SLURM_ARRAY_TASK_COUNT": "2"},
      (1, 2),  # --array=1-8:4 is 1 and 5
    ),
    # --array=5 with --num_tasks=64 is part 5 again, not part 0 of 1
    (64, None, {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "1"}, (5, 64)),
  ],
)
def test_a_task_knows_its_part(num_tasks, task_index, environ, expected):
  part = tasks.find_task(num_tasks, task_index, environ)
  assert (part.index, part.count) == expected


@pytest.mark.parametrize(
  ("num_tasks", "task_index", "environ", "reason"),
  [
    (None, 3, {}, "--task_index=3 needs --num_tasks"),
    (8, None, {}, "--num_tasks=8 needs --task_index outside"),
    (8, 8, {}, "--task_index=8 is no task of --num_tasks=8; .* 0 to 7"),
    (4, None, ARRAY, "SLURM_ARRAY_TASK_ID=5 is no task of --num_tasks=4"),
    (None, None, {"JOB_COMPLETION_INDEX": "3"}, "say --num_tasks=N"),
    (4, None, {"JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX=x is no number"),
    (None, None, {"SLURM_ARRAY_TASK_ID": "5"}, "SLURM_ARRAY_TASK_COUNT=None"),
    # --array=1,5,8
    (None, None, ARRAY | {"SLURM_ARRAY_TASK_COUNT": "3"}, "not evenly numbered"),
  ],
)
def test_a_task_that_cannot_know_its_index_says_what_to_give(
  num_tasks, task_index, environ, reason
):
  with pytest.raises(errors.UsageError, match=reason):
    tasks.find_task(num_tasks, task_index, environ)
