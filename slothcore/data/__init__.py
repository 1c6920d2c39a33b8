"""Records, tokenizing, masking and packing. Nothing here knows a model."""
