"""What a step costs: time, memory traffic, memory, compilation. ``python -m benchmarks.step``."""
