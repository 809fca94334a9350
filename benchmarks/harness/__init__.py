"""What all benchmarks share: contestants in turns, what processes cost, a mesh, reports."""
