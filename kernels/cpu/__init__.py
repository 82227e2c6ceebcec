"""The native CPU module and its typed wrappers."""
