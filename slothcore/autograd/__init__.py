"""`torch.autograd.Function` classes with hand-derived backwards. No `nn.Module`, no configuration."""
