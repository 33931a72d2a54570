"""The search for the highest sustained rate: verdicts of load points, and which rate is measured next."""
