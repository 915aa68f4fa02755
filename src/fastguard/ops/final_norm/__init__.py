"""Gather rows and apply a model's final norm, in the vocabulary ops' own forward and backward.

No op of its own: ``lm_head_stats`` calls the backends beside this file inside its custom ops. Specification:
``lens_stats/reference.py``.
"""

__all__: list[str] = []
