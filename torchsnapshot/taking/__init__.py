"""Taking a snapshot in one process: the plan, the work on each chunk, the order of the steps."""
