"""Thin modules over `slothcore.autograd`. They know nothing of model families."""
