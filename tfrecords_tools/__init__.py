"""Offline tools that turn face images into TFRecord shards."""
