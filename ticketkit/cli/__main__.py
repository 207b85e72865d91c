"""`python -m ticketkit.cli` is `ticketkit`."""

from ticketkit.cli import main

if __name__ == "__main__":
    main()
