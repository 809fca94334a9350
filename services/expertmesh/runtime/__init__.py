"""What every process of the mesh shares: errors, wire format, configuration, state, servers. No business rules."""
