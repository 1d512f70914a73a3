"""Which blocks go: rules over scores, and the plans that they make."""
