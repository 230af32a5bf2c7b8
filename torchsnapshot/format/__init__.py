"""What a manifest says about a state: the entries, and their bytes. The container around them is the store's."""
