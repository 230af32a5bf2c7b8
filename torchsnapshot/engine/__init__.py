"""What carries work: pooled buffers, worker threads, staging, the meter of a store's speed. Knows no tensors."""
