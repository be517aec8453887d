"""Verification and timing that work in an installed package and on a bare machine with torch, triton and numpy only."""
