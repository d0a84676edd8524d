"""Bytes a rank and communication a step under each engine: measured, as formulas, and applied to a large model."""
