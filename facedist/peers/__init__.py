"""Who of the cluster is alive and what each is doing; heartbeats between workers."""
