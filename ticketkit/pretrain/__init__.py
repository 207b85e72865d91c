"""Training objectives, one file each: a loss for the training loop and a metric to report."""
