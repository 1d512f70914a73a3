"""A plan, carried out on the files of a checkpoint or on a live model."""
