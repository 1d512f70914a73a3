"""Whether a checkpoint is right, and how good and how fast it is."""
