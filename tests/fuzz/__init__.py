"""Fuzzing of everything that reads what a peer sends (docs/security.md, `make fuzz`)."""
