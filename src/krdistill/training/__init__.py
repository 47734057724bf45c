"""What a training step is, and how steps are run."""
