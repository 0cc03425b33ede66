"""Benchmarks of gserve's costs and gains."""
