"""The training loop, its options, its optimizers and the state of a run."""
