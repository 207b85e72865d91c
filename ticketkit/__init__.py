"""ticketkit: find lottery tickets in pretrained vision models, export them, and run them faster than dense.

Importing this package imports neither torch nor onnxruntime; each name below loads what it needs when first used.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

try:
    __version__ = _version("ticketkit")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from ticketkit.analysis.compare import compare
    from ticketkit.errors import TicketkitError
    from ticketkit.estimator import estimate
    from ticketkit.exporters import export
    from ticketkit.runtime.native import library_path as get_library_path
    from ticketkit.runtime.ort import register
    from ticketkit.runtime.torch_modules import densify_, sparsify_
    from ticketkit.search.find import find
    from ticketkit.session import InferenceSession
    from ticketkit.ticket import Ticket
    from ticketkit.verifier import verify

_HOME = {  # public name -> (module, name there)
    "InferenceSession": ("ticketkit.session", "InferenceSession"),
    "Ticket": ("ticketkit.ticket", "Ticket"),
    "TicketkitError": ("ticketkit.errors", "TicketkitError"),
    "compare": ("ticketkit.analysis.compare", "compare"),
    "densify_": ("ticketkit.runtime.torch_modules", "densify_"),
    "estimate": ("ticketkit.estimator", "estimate"),
    "export": ("ticketkit.exporters", "export"),
    "find": ("ticketkit.search.find", "find"),
    "get_library_path": ("ticketkit.runtime.native", "library_path"),
    "register": ("ticketkit.runtime.ort", "register"),
    "sparsify_": ("ticketkit.runtime.torch_modules", "sparsify_"),
    "verify": ("ticketkit.verifier", "verify"),
}
__all__ = [
    "InferenceSession", "Ticket", "TicketkitError", "__version__", "compare", "densify_", "estimate", "export", "find", "get_library_path",
    "register", "sparsify_", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ticketkit' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
