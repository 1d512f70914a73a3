"""Conversations with live models, in a terminal and on a page."""
