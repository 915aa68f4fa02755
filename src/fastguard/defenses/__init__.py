"""Published defenses, each a page of code on the rooms below."""
