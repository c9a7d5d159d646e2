"""Novelty: is this text new, and when is that certain enough to grow?

>>> from cambia.continual import NoveltyDetector
"""

from __future__ import annotations

from cambia.continual.novelty.detector import Decision, NoveltyDetector, Verdict
from cambia.continual.novelty.scores import NOVELTY_SCORES, Readings

__all__ = ["NOVELTY_SCORES", "Decision", "NoveltyDetector", "Readings", "Verdict"]
