"""What a state is: nested values and tensors, flattened to leaves and composed again."""
