"""The modeling files that go into checkpoints, and how they are put together."""
