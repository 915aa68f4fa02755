"""Public data sets that packages ship, divided so that no prompt and no near-duplicate serves two purposes."""
