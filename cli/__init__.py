"""The `redline` command: one small file per subcommand, no logic."""
