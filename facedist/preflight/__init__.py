"""What can be known before GPUs are paid for."""
