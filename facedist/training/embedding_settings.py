"""Which weights of a run embed, and how: flags that embed and export share."""

import dataclasses

from facedist.config import setting
from facedist.training.loading import WEIGHTS, WEIGHTS_HELP


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingSettings:
  """A checkpoint's network, and what becomes of its raw embeddings."""

  workdir: str = setting(help="Folder of the training run.", path=True)
  checkpoint: str | None = setting(
    None,
    help="Step or path of the checkpoint; the newest where not given.",
    path=True,
  )
  weights: str = setting("auto", help=WEIGHTS_HELP, choices=WEIGHTS)
  normalize: bool = setting(True, help="Whether embeddings have length 1.")
  mirror: bool = setting(
    False, help="Whether to embed image plus mirrored image, as evaluation does."
  )
