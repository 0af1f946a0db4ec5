"""The papers' own experiments, small, on real models and real text."""
