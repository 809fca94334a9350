"""What every process shares: errors, wire format, configuration, state, servers. No rules."""
