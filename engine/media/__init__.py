"""Images, audio and video of requests: fetched and decoded within limits, since their senders are not trusted."""
