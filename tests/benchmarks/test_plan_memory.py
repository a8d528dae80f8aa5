import re

import pytest

from benchmarks import plan_memory


@pytest.mark.slow
@pytest.mark.parametrize(
  "settings", [{"landmarks": True}, {"landmarks": False}, {"is_listed": True}]
)
def test_each_size_is_planned_in_a_process_of_its_own(tmp_path, capsys, settings):
  plan_memory.main(
    plan_memory.BenchmarkConfig(images="100,301", scratch=str(tmp_path), **settings)
  )
  lines = capsys.readouterr().out.splitlines()
  found = [re.match(r" *(\d+) images: peak (\d+) MiB resident", line) for line in lines]
  assert [int(match[1]) for match in found if match] == [100, 301]
  assert all(20 < int(match[2]) < 1000 for match in found if match)
  assert list(tmp_path.iterdir()) == []
