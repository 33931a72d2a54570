"""Workloads, load generator, measurement, the search for the sustained rate, sweeps."""
