"""Gradient in, preconditioned gradient out, in place."""
