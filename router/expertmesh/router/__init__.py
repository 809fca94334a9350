"""The router core: gate, selection, snapshot, plan, dispatch, combine; and RouterService around it."""
