"""Sirocco's kernels: functions of tensors only. Imports nothing else of ours.

ABI counts changes of the native module's interface. There is no __version__: another distribution uses this import
name too, and libraries look for its version here.
"""

ABI = 5
