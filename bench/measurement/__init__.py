"""Measuring one configuration with one workload: load points, closed loops, whole runs, and their progress."""
