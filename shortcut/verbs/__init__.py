"""One verb, one file: the record of what it is asked for, and its road through the rooms below."""
