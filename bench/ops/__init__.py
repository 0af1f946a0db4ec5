"""bench_<op>.py: ``cases(size)`` yields the op's cases, each with ours first, its peers after it, and the goal."""
