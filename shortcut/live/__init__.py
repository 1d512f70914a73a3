"""A model in memory: loaded, taken apart into blocks, or left on the disk in part."""
