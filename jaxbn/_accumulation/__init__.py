"""Statistics of many batches: gathered, pooled, re-estimated."""
