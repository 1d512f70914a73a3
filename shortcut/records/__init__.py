"""Plain data that stations hand on: actions, plans, scores."""
