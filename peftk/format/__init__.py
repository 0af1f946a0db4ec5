"""Formats: the 4-bit codes, the dynamic 8-bit codes, and a quantised weight. Knows no op and no layer."""
