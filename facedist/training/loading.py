"""A trained network, rebuilt from a workdir alone, for evaluation and export."""

import tensorflow as tf

from facedist.training import checkpoints, restoring
from facedist.training.state import build_network


class Network:
  """A network with the weights of one checkpoint.

  Attributes:
    step: Step of the checkpoint whose weights are loaded.
    name: Backbone, embedding size and checkpoint, such as resnet50-512@step-00000100.
    image_size: Height and width of its input in pixels.
    embedding_size: Floats of an embedding.
  """

  def __init__(self, workdir: str, checkpoint: checkpoints.Checkpoint) -> None:
    settings = checkpoints.load_config(workdir)
    self.image_size = int(checkpoint.marker()["image_size"])
    self.embedding_size = settings.embedding_size
    self._kind = f"{settings.backbone}-{settings.embedding_size}"
    self._network = build_network(settings, self.image_size)
    self.embed = tf.function(self._network.embed, reduce_retracing=True)
    self.restore(checkpoint)

  def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
    """Loads another checkpoint's weights, without compiling anew.

    Raises:
      errors.DataError: The files are damaged or of another network.
    """
    state = tf.train.Checkpoint(network=self._network)
    restoring.restore(state, checkpoint, is_whole=False)
    self.step = checkpoint.step
    self.name = f"{self._kind}@{checkpoint.name}"


def load_network(workdir: str, checkpoint: checkpoints.Checkpoint) -> Network:
  """Rebuilds the network of a run with the weights of `checkpoint`.

  `Network.embed` takes uint8 or float32[n, S, S, 3] RGB pixels in [0, 255] and
  returns raw float32[n, embedding], in inference mode.

  Raises:
    errors.DataError: workdir or checkpoint is incomplete, damaged or another run's.
    errors.ConfigError: config.json is not of this version.
  """
  return Network(workdir, checkpoint)
