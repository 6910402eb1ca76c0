"""Training of editors with weights, by a Trainer subclass."""
