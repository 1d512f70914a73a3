"""What every room uses: errors, text, progress, processes, the version."""
