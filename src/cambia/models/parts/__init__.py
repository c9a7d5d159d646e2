"""Parts: capacity that stands beside a model, with tensors of its own.

>>> from cambia.models import LoraExperts
"""
