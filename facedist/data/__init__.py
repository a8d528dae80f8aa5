"""The input: from shards to batches, as a pure function of the step."""
