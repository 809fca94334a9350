"""Side-by-side measurements; docs/performance.md tells how to repeat them and what they showed."""
