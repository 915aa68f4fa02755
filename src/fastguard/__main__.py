"""``python -m fastguard``."""

from fastguard._main import main

main()
