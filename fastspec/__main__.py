"""``python -m fastspec``: the command line, also for ``accelerate launch -m fastspec``."""

from fastspec.cli import main

main()
