"""The command line. ``growkit --help`` and ``validate`` import neither torch nor lightning."""
