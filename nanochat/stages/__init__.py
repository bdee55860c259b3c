"""The stages of a run, one file each, read top to bottom; they meet only in the run directory."""
