"""Writing trained models in other programs' formats."""
