"""The full benchmark suite. The parts that an installed package needs are in dampr/bench."""
