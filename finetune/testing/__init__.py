"""What tests and benchmarks build on, here and in packages that add to this one: bases of the true classes."""
