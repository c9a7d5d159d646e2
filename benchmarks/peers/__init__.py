"""The sides of `growth_peers.py`, each run in a process of its own."""
