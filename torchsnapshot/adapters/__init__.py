"""What stands between a framework's own way of giving state and ``Stateful``; each module is imported on its own."""
