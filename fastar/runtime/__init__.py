"""What every room stands on: devices, memory, clocks, signals, progress, seeds."""
