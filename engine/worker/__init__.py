"""One rank: slots, runner, model backends, sampler, executors."""
