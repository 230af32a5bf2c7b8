"""How the ranks of a job talk to one another, over the process group's store. Knows no tensors and no snapshots."""
