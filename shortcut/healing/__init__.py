"""What shortening cost, won back: by linear maps, by numbers, by training."""
