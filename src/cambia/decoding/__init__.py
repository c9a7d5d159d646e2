"""Learned decoding: how a model's next token is drawn, as parameters that are fitted."""
