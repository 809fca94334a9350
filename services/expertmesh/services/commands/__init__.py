"""The commands of `expertmesh`, a module each: `add` declares the flags, `run` does the work.

Modules import what they need when they run, so that help is instant.
"""
