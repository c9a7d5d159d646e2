"""Sweeps read back: cells, tables, paired differences, figures, pages."""
