"""The benchmarks: what gserve costs and what it gains, measured."""
