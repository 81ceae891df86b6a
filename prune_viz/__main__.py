"""Let ``python -m prune_viz`` do what the console script does."""

from prune_viz.cli import main

main()
