"""What runs need beside their mathematics: random streams, checkpoints, progress, processes."""
