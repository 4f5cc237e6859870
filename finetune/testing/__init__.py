"""Shared code for tests and benchmarks, also of packages that extend this one: small bases of the real classes."""
