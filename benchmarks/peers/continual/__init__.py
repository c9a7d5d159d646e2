"""The sides of `continual_peers.py`: the same tasks, weights and batches for Cambia and for Avalanche."""
