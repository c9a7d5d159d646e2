"""`python -m cambia` is the same as `cambia`."""

from cambia.cli import main

main()
