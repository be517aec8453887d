"""The full benchmark suite; the parts an installed package needs are in dampr/bench."""
