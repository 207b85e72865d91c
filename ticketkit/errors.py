"""The one error hierarchy. Every message is a single line: what was expected, what came, what to do next."""


class TicketkitError(Exception):
    """Base of every error ticketkit raises on purpose; the command line prints it without a traceback."""


class TicketError(TicketkitError):
    """A ticket, a mask or a run directory is missing, malformed or does not fit its model."""


class ModelError(TicketkitError):
    """A network or its weights cannot be used: unknown name, missing layer, wrong shape, NaN."""


class FormatError(TicketkitError):
    """A sparse weight (CSR, gap-coded, ...) breaks its format; the message names the field."""


class KernelError(TicketkitError):
    """The native library is missing, refuses a call, or the forced ISA cannot run here."""


class ExportError(TicketkitError):
    """An export failed, or its result differs from the original by more than the derived tolerance."""


class DataError(TicketkitError):
    """A data set or an input file is missing, truncated or of the wrong shape."""


class DeviceError(TicketkitError):
    """A phone or board cannot be reached or used, ran out of space, went away, or sent what cannot be believed."""


def printable(text: str) -> str:
    """Foreign text fit for a terminal: a question mark for each control character."""
    return "".join(character if character.isprintable() else "?" for character in text)


def first_line(error: Exception) -> str:
    """The first line of what somebody else's error says, its class where it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
