"""Speculative decoding: tokens that are proposed cheaply, and verified by the target in one forward."""
