"""What is stored: layouts, layers and checkpoints."""
