"""Data of a run: public sets that packages ship, or a user's own; no prompt serves two purposes."""
