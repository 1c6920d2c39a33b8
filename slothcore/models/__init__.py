"""One decoder, one small file per family, and the reading and writing of checkpoints."""
