"""``python -m fastguard.bench``."""

import sys

from fastguard.bench.command import main

sys.exit(main())
