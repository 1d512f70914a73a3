"""How important blocks are: the walk through a model, and the metrics."""
