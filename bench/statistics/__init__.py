"""Percentiles, intervals and rates from recorded requests."""
