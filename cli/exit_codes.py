"""Exit codes of the commands, beside 0 and click's 2 for wrong flags."""

FAILED = 1  # an error, or nothing could be judged
FAILED_REQUESTS = 3  # the measurement is complete, but requests failed
UNDECIDED = 4  # no rate was shown to be sustained because windows were too short
INTERRUPTED = 130  # Ctrl-C; shells report the same
