"""What is told of a layer and of its answers."""
