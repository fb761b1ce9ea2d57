"""The ground of every room: devices, memory, clocks, signals, progress, seeds, JSON files."""
