"""Sweeps: several configurations on several workloads, from a sweep file."""
