import pytest

from benchmarks import head
from benchmarks.head_formulas import Job
from facedist import errors


def test_the_goals_are_ratios_of_the_most_identities_to_the_fewest():
  cases = [  # sharding, workers, identities, seconds, MiB
    ("sampled", 1, 10, 2.0, 100),
    ("sampled", 1, 1000, 3.0, 500),
    ("sampled", 2, 10, 1.0, 150),
    ("sampled", 2, 1000, 1.2, 360),
    ("sharded", 1, 10, 2.0, 100),  # no room for more
    ("replicated", 1, 10, 2.0, 100),
    ("replicated", 1, 1000, 4.0, 500),
    ("replicated", 2, 10, 2.0, 100),
    ("replicated", 2, 500, 3.0, 300),  # room for half of them
  ]
  found = [
    head.Measured(
      Job(sharding, identities, global_batch=4, replicas=workers),
      seconds,
      mib << 20,
      sent_bytes=None,
    )
    for sharding, workers, identities, seconds, mib in cases
  ]
  assert head.ratios(found) == pytest.approx(
    {
      "replicated, 1 workers: step with 1,000 / 10": 2.0,
      "replicated, 2 workers: step with 500 / 10": 1.5,
      "sampled, 1 workers: step with 1,000 / 10": 1.5,
      "sampled, 2 workers: step with 1,000 / 10": 1.2,
      "sampled: a worker's memory of two / one": 210 / 400,
    }
  )


def test_what_finds_no_room_is_halved_until_it_does(monkeypatch: pytest.MonkeyPatch):
  settings = head.BenchmarkConfig(identities="1000,1000000", workers="2")
  gibibytes = 200
  monkeypatch.setattr(head, "_available_bytes", lambda: gibibytes << 30)
  found = head._that_fit(settings, "sharded", 2)
  assert [case.identities for case in found] == [1000, 1_000_000]
  gibibytes = 22  # 8 for the four processes, and some 14 GiB for a million
  found = head._that_fit(settings, "sharded", 2)
  assert [case.identities for case in found] == [1000, 500_000]
  gibibytes = 4
  with pytest.raises(errors.UsageError, match="there is no memory for 1,000"):
    head._that_fit(settings, "sharded", 2)


@pytest.mark.slow
def test_two_workers_are_measured_beside_the_formulas(
  capsys: pytest.CaptureFixture[str],
):
  head.main(
    head.BenchmarkConfig(
      identities="50",
      shardings="sampled",
      workers="2",
      backbone="tinynet",
      batch=4,
      embedding_size=16,
      rounds=1,
    )
  )
  lines = capsys.readouterr().out.splitlines()
  rows = [line.strip("| ").split(" | ") for line in lines if "MiB" in line]
  assert [row[:3] for row in rows] == [["sampled", "2", "50"]]
  for row in rows:
    if row[7] != "–":  # where processes may have a network of their own
      sent, formula = (float(text.removesuffix(" MB")) for text in row[7:9])
      assert sent == pytest.approx(formula, rel=0.2)
  assert len([line for line in lines if "GiB" in line]) == 27
