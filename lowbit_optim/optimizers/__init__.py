"""``torch.optim.Optimizer`` classes."""
