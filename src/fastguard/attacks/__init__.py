"""Attacks, for evaluation only: what a fresh attacker needs to undo a defense."""
