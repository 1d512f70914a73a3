"""What models are run on: text, images, questions."""
