"""One rank: rows, runner, sampler, executor."""
