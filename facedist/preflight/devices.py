"""What devices a worker has; asked without taking them."""

import ctypes

import tensorflow as tf

_DRIVER = "libcuda.so.1"


def describe() -> list[str]:
  """Returns a name for each of this worker's devices, with a GPU's kind and memory."""
  gpus = tf.config.list_physical_devices("GPU")
  if not gpus:
    return ["CPU"]
  names = []
  for place, gpu in enumerate(gpus):
    details = tf.config.experimental.get_device_details(gpu)
    capability = ".".join(map(str, details.get("compute_capability", ())))
    memory = _memory_bytes(place)
    size = f", {memory / 1e9:.0f} GB" if memory else ""
    names.append(f"{details.get('device_name', 'GPU')} ({capability}{size})")
  return names


def _memory_bytes(place: int) -> int | None:
  """Returns the memory of a GPU that is visible to this process; None if unknown.

  The driver says so at once; TensorFlow would have to set up the GPU first, for good.
  """
  try:
    driver = ctypes.CDLL(_DRIVER)
  except OSError:
    return None
  device, total = ctypes.c_int(), ctypes.c_size_t()
  failed = (
    driver.cuInit(0)
    or driver.cuDeviceGet(ctypes.byref(device), ctypes.c_int(place))
    or driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
  )
  return None if failed else total.value
