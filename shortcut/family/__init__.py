"""What families of models are like: where their blocks are, which fields follow them, what they can lose."""
