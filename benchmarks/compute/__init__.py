"""Parts of the benchmark of compute to a loss: its arms, and what curves say of each other."""
