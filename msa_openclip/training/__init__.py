"""What open_clip's trainer is given: loss, batches, validation metrics."""
