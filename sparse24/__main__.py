"""``python -m sparse24``: the command line."""

from sparse24.cli import main

main()
