"""Who may talk to whom: certificates, the mesh's identity, tokens, limits of callers.

What is here reads no configuration; `services/` and the replica hand in what it says.
"""
