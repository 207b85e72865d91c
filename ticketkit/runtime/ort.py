"""Registers ticketkit's operators with onnxruntime."""

from __future__ import annotations

from typing import Any

from ticketkit.errors import KernelError
from ticketkit.runtime import native

THREADS_KEY = "ai.ticketkit.threads"  # session option: how many threads the operators split their work over
REGISTERED_KEY = "ai.ticketkit.registered"  # session option that the library sets


def register(options: Any) -> None:
    """Adds SparseConv, SparseGemm and their fused variants (domain `ai.ticketkit`) to an onnxruntime `SessionOptions`.

    Every session made with these options then runs exported files sparse. Call it after `intra_op_num_threads` is set: the operators split
    their work over that many threads (0: all cores). A second call changes nothing.
    Raises KernelError where the library is missing, cannot be loaded or `$TICKETKIT_ISA` cannot run here.
    """
    path = native.library_path()
    native.active_isa()
    if _registered(options):
        return
    if options.intra_op_num_threads > 0:
        options.add_session_config_entry(THREADS_KEY, str(options.intra_op_num_threads))
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # onnxruntime raises its own classes, which derive from RuntimeError or Exception by version
        raise KernelError(f"onnxruntime cannot register {path}: {error}") from error


def _registered(options: Any) -> bool:
    try:
        options.get_session_config_entry(REGISTERED_KEY)
    except RuntimeError:  # its way to say that there is none
        return False
    return True
