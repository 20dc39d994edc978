"""Rows to batches: read, rendered, tokenised and packed once, then a pure function of seed, epoch and row."""
