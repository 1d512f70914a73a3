"""A model on the disk: headers, byte ranges, other forms, and how a folder is written."""
