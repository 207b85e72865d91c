"""Verdicts on tickets: `verify` trains the dense network and the ticket alike and compares; `verdicts` holds the rules.

`origin` says what is trained (a ticket's masks and weights, and their controls), `trial` is one training, kept by content in a
store, `report` is what comes out, `table` prints it.
"""

from ticketkit.verifier.report import Report
from ticketkit.verifier.verify import verify

__all__ = ["Report", "verify"]
