"""What training steps cost, ours beside stock PEFT's: `python -m benchmarks.speed`, `python -m benchmarks.memory`."""
