"""What a checkpoint says of itself: model card, report, pictures; and its way to the Hub."""
