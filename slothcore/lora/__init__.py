"""LoRA adapters: attach, save, load, merge, in PEFT's format."""
