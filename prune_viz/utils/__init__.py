"""What every room stands on: files, JSON, memory, devices, progress and errors."""
