"""Measurement: engines side by side on one model, and rows that never carry a lone speedup.

`timing.measure` runs the protocol, `rows.Row` is what it leaves behind, `engines/` holds one file per engine.
"""
