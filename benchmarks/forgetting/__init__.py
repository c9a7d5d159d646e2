"""Parts of the continual benchmark: its rows and its pictures."""
