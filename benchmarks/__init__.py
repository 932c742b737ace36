"""Measurements that the documentation cites: ``python -m benchmarks.<name>`` prints one and keeps it in results/."""
