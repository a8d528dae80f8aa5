"""The input: shards on disk to batches on the device, a pure function of the step."""
