"""What is asked of a layer and is no op's own question: threads, overhead of a call, memory. As in bench/ops, or ``rows``."""
