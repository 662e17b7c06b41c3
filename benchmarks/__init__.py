"""Load tests of the running service: profiles, Locust, perf_analyzer, the gate of the promise, and its report."""
