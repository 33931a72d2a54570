"""Plans of deployments: how many of which hardware serve a load within latency limits, from simulations."""
