"""What a run tells while it runs and at its end: progress, verdicts."""
