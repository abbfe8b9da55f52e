"""kvk's benchmarks. `python -m kvk bench` runs them; docs/benchmarks.md says how to read them."""
