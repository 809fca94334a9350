"""The router core: gate, snapshot, plan, dispatch, combine; and RouterService around it."""
