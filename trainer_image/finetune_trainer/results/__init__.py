"""What a run leaves: checkpoints, journal, the published output."""
