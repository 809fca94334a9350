"""A mesh of virtual replicas under a virtual clock: what scaling, dispatch and faults would do."""
