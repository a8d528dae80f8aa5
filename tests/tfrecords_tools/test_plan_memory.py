import tracemalloc

import pytest

from facedist.storage import paths
from tfrecords_tools import external_sort
from tfrecords_tools.builder import plan
from tfrecords_tools.sources import listing, vggface2

A_GROUP = 200


def peak_of_plan(folder, num_images):
  """Peak of allocated bytes while so many images with landmarks are planned."""
  listed, table = folder / f"{num_images}.txt", folder / f"{num_images}.csv"
  names = [
    f"n{number // A_GROUP:06d}/{number:08d}"
    for number in (place * 7919 % num_images for place in range(num_images))
  ]
  listed.write_text("".join(f"gs://faces/{name}.jpg\n" for name in names))
  table.write_text("".join(f"{name},0,1,2,3,4,5,6,7,8,9\n" for name in names))
  del names
  tracemalloc.start()
  images = vggface2.read(
    listing.list_images(None, input_list=str(listed)),
    landmarks=str(table),
    bounding_boxes=None,
    identity_meta=None,
    missing_row="fail",
    min_images=2,
  )
  made = plan.plan_training_set(
    images.groups,
    seed=0,
    num_shards=num_images // 200,
    val_fraction=0.1,
    max_images=A_GROUP * 9 // 10 - 1,
  )
  assert len(made.images_of(made.shards[0]).paths) == made.shards[0].num_images
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  return peak


@pytest.mark.slow
def test_six_times_the_images_plan_in_the_same_memory(tmp_path, monkeypatch):
  monkeypatch.setattr(external_sort, "ROWS_A_BATCH", 1000)
  monkeypatch.setattr(paths, "_LINES_PIECE_BYTES", 1 << 16)
  small, large = (peak_of_plan(tmp_path, count) for count in (5_000, 30_000))
  # In memory, 25,000 paths, landmarks and rows more would be some 9 MiB more.
  assert large - small < 1 << 20
