"""Launchers: the same run on this machine's Docker, a cloud, RunPod or a SLURM cluster.

A launcher is one module with two functions. `render` is pure: a job in, everything that would be
sent out, as a value to print and to compare. `submit` sends it. They share only `base` and do not
know each other.
"""
