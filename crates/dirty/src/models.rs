//! Loom models of the lock-free parts: every interleaving of a few threads, under the C11 memory model.
